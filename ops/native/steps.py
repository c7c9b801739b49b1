"""Calls of the native kernels, recorded once and repeated without Python between them."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

from .abi import Status
from .loader import NativeLibrary

#: Functions that can be recorded, in the order of their numbers in ``ascend_cpu_run_steps``.
FUNCTIONS = (
    "attention",
    "write",
    "linear",
    "int8_linear",
    "quantise",
    "hadamard",
    "mla_attention",
    "mla_write",
    "add_rms_norm",
    "dense",
    "rotary",
    "elementwise",
    "embedding",
    "static_quantise",
)


class Step(NamedTuple):
    """One call.

    Attributes:
        function: its number, the index in :data:`FUNCTIONS`.
        args: packed argument struct; the addresses in it must stay valid.
    """

    function: int
    args: bytes


class _Step(ctypes.Structure):
    """``ascend_step``."""

    _fields_ = [("function", ctypes.c_int64), ("args", ctypes.c_char_p)]


class StepError(RuntimeError):
    """A repeated call failed: what its arguments point to no longer fits."""


class Program:
    """Recorded calls, ready to be repeated on the addresses they were recorded with."""

    def __init__(self, lib: NativeLibrary, steps: Sequence[Step]) -> None:
        """Keep the steps.

        Args:
            lib: the library that they were recorded from.
            steps: in order.
        """
        self.steps = tuple(steps)
        self._run = lib.run_steps
        # c_char_p keeps no reference of its own in an array: self.steps owns the bytes.
        self._array = (_Step * len(steps))(*(_Step(step.function, step.args) for step in steps))
        self._count = ctypes.c_int64(len(steps))
        self._stopped = ctypes.c_int64(-1)

    def run(self) -> None:
        """Repeat the calls.

        Raises:
            StepError: one of them refuses; those before it have run.
        """
        status = self._run(self._array, self._count, ctypes.byref(self._stopped))
        if status != Status.OK:
            index = self._stopped.value
            raise StepError(
                f"step {index} of {len(self.steps)} ({FUNCTIONS[self.steps[index].function]}) "
                f"failed with {Status(status).name}: a block, slot, position or token id lies "
                "outside of its table."
            )


@contextmanager
def record(lib: NativeLibrary) -> Iterator[list[Step]]:
    """Note every call of the library while the context lasts; the calls run as always.

    The caller runs alone in the process meanwhile: the library is shared.

    Args:
        lib: what ``loader.load()`` returned.

    Yields:
        The calls so far.
    """
    steps: list[Step] = []
    originals = {name: getattr(lib, name) for name in FUNCTIONS}
    for number, name in enumerate(FUNCTIONS):
        setattr(lib, name, _noting(steps, number, originals[name]))
    try:
        yield steps
    finally:
        for name, function in originals.items():
            setattr(lib, name, function)


def _noting(
    steps: list[Step], number: int, function: Callable[[object], int]
) -> Callable[[object], int]:
    def call(args: object) -> int:
        assert isinstance(args, bytes)
        steps.append(Step(number, args))
        return function(args)

    return call
