"""Launches AscendC kernels on the host model, under schedules that try to break them."""

from __future__ import annotations

import ctypes
import functools
import json
import os
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch

from . import build

#: How many schedules ``schedules()`` gives by default.
SCHEDULES_VARIABLE = "ASCENDC_SCHEDULES"
_DEFAULT_SCHEDULES = 8
_REPORT_BYTES = 1 << 16

_FORMATS: Final[Mapping[str, str]] = {
    "uint64_t": "<Q",
    "int64_t": "<q",
    "uint32_t": "<I",
    "int32_t": "<i",
    "uint16_t": "<H",
    "int16_t": "<h",
    "uint8_t": "<B",
    "int8_t": "<b",
    "bool": "<?",
    "float": "<f",
    "double": "<d",
}

Argument = torch.Tensor | int | float | None


class KernelError(RuntimeError):
    """A kernel broke a rule of the chip; the text names the core, the API and the values."""


@dataclass(frozen=True, slots=True)
class Schedule:
    """An order in which pipes and cores run.

    Attributes:
        seed: 0 runs each instruction at once, 1 as late as the flags allow and consumers first,
            any other at random, with a pace for each pipe.
    """

    seed: int = 0


@dataclass(frozen=True, slots=True)
class PipeWork:
    """What one pipe did, summed over the cores of a kind.

    Attributes:
        instructions: issued, flags and barriers not counted.
        bytes: read and written by them.
        busy_cycles: estimated.
    """

    instructions: int
    bytes: int
    busy_cycles: int


@dataclass(frozen=True, slots=True)
class Traffic:
    """Bytes of a GM buffer that were read and written, repeats counted."""

    read: int
    written: int


@dataclass(frozen=True, slots=True)
class Report:
    """What a launch did.

    Attributes:
        aic: work of the cube cores by pipe ("MTE2", "M", ...).
        aiv: work of the vector cores by pipe.
        traffic: GM traffic by argument name.
        pipe_cycles: estimate: longest chain of instructions and flags on a core.
        memory_cycles: estimate: the traffic at the bandwidth of HBM, at the least; that of an
            argument named ``workspace`` at the bandwidth of L2.
        busiest: what the estimate keeps busy longest: "HBM", or a pipe of a core ("AIV V").
        busiest_cycles: for how long.
        bound: what that belongs to: "memory", "cube" or "vector".
        clock_ghz: of both estimates.
    """

    aic: Mapping[str, PipeWork]
    aiv: Mapping[str, PipeWork]
    traffic: Mapping[str, Traffic]
    pipe_cycles: int
    memory_cycles: int
    busiest: str
    busiest_cycles: int
    bound: str
    clock_ghz: float

    @property
    def cycles(self) -> int:
        """The estimate: the larger of the two bounds."""
        return max(self.pipe_cycles, self.memory_cycles)

    @property
    def read(self) -> int:
        """Bytes read from GM."""
        return sum(buffer.read for buffer in self.traffic.values())

    @property
    def written(self) -> int:
        """Bytes written to GM."""
        return sum(buffer.written for buffer in self.traffic.values())


class _Buffer(ctypes.Structure):
    _fields_ = (
        ("address", ctypes.c_uint64),
        ("bytes", ctypes.c_uint64),
        ("name", ctypes.c_char_p),
    )


@dataclass(frozen=True, slots=True)
class _Entry:
    index: int
    arguments: tuple[tuple[str, str], ...]


class KernelLibrary:
    """A kernel file compiled against the host model.

    Attributes:
        path: of the shared library.
        names: entry points.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._library = ctypes.CDLL(str(path))
        self._library.ascendc_host_entries.restype = ctypes.c_char_p
        self._entries = _parse_entries(self._library.ascendc_host_entries().decode())
        self.names = tuple(self._entries)

    def launch(
        self,
        name: str,
        block_dim: int,
        arguments: Sequence[Argument],
        schedule: Schedule = Schedule(),
        strict: bool = True,
        races: bool = True,
    ) -> Report:
        """Run an entry point to its end.

        Args:
            name: entry point.
            block_dim: cores: vector cores, or groups of a mixed kernel.
            arguments: in the order of the signature. A tensor's storage becomes a GM buffer with
                bounds (contiguous, on the CPU); None is a null pointer.
            schedule: order in which pipes and cores run.
            strict: whether dependent instructions of one pipe need a PipeBarrier between them.
            races: whether two accesses that nothing orders are an error by themselves. Without,
                only their effect on the data shows, under some schedules.

        Returns:
            What the kernel did, with an estimate of its cycles.

        Raises:
            KernelError: the kernel broke a rule of the chip, under this schedule.
            TypeError: an argument of the wrong kind.
            ValueError: no such entry point, a wrong number of arguments, or a tensor that is not
                contiguous.
        """
        entry = self._checked(name, block_dim, arguments)
        words, buffers = _marshal(entry, arguments)
        out = ctypes.create_string_buffer(_REPORT_BYTES)
        failed = self._library.ascendc_host_launch(
            entry.index,
            ctypes.c_uint32(block_dim),
            ctypes.c_uint64(schedule.seed),
            int(strict) | int(races) << 1,
            words,
            buffers,
            len(buffers),
            out,
            ctypes.c_size_t(_REPORT_BYTES),
        )
        text = out.value.decode(errors="replace")
        if failed:
            raise KernelError(f"{name} (schedule {schedule.seed}): {text}")
        return _report(json.loads(text))

    def _checked(self, name: str, block_dim: int, arguments: Sequence[Argument]) -> _Entry:
        """Return the entry point that a launch asks for."""
        entry = self._entries.get(name)
        if entry is None:
            raise ValueError(f"no entry point {name!r}; there are: {', '.join(self.names)}")
        if block_dim < 1:
            raise ValueError(f"block_dim {block_dim}: at least one core")
        if len(arguments) != len(entry.arguments):
            declared = ", ".join(argument for _, argument in entry.arguments)
            raise ValueError(
                f"{name} takes {len(entry.arguments)} arguments ({declared}); "
                f"{len(arguments)} given"
            )
        return entry


def library(name: str, folder: Path | None = None) -> KernelLibrary:
    """Return the compiled kernel file ``<name>.cpp``.

    Args:
        name: stem of the file.
        folder: where it lies; the package's kernels (or ``$ASCENDC_KERNELS_DIR``) when None.

    Raises:
        KernelBuildError: it cannot be compiled (from ``build``).
    """
    return _load(build.library_path(name, folder))


@functools.cache
def _load(path: Path) -> KernelLibrary:
    return KernelLibrary(path)


def schedules(count: int | None = None) -> list[Schedule]:
    """Return ``count`` schedules: eager, laziest, then random ones.

    Args:
        count: how many; ``$ASCENDC_SCHEDULES`` or 8 when None.
    """
    if count is None:
        count = int(os.environ.get(SCHEDULES_VARIABLE, _DEFAULT_SCHEDULES))
    return [Schedule(seed) for seed in range(count)]


def _parse_entries(text: str) -> dict[str, _Entry]:
    entries = {}
    for index, line in enumerate(text.splitlines()):
        name, _, declared = line.split("\t")
        arguments = tuple(
            (kind, argument)
            for kind, argument in (pair.split(" ") for pair in declared.split(",") if pair)
        )
        entries[name] = _Entry(index, arguments)
    return entries


def _marshal(
    entry: _Entry, arguments: Sequence[Argument]
) -> tuple[ctypes.Array[ctypes.c_uint64], ctypes.Array[_Buffer]]:
    words = (ctypes.c_uint64 * max(1, len(arguments)))()
    buffers = []
    for index, ((kind, name), value) in enumerate(zip(entry.arguments, arguments, strict=True)):
        if kind != "GM_ADDR":
            words[index] = _scalar(kind, name, value)
        elif value is not None:
            buffer = _buffer(name, value)
            words[index] = buffer.address
            if buffer.bytes:
                buffers.append(buffer)
    return words, (_Buffer * len(buffers))(*buffers)


def _scalar(kind: str, name: str, value: Argument) -> int:
    if value is None or isinstance(value, torch.Tensor):
        raise TypeError(f"argument {name} is {kind}, got {type(value).__name__}")
    try:
        packed = struct.pack(_FORMATS[kind], value)
    except struct.error as error:
        raise TypeError(f"argument {name} is {kind}, got {value!r} ({error})") from None
    return int.from_bytes(packed, "little")


def _buffer(name: str, value: Argument) -> _Buffer:
    if not isinstance(value, torch.Tensor):
        raise TypeError(f"argument {name} is GM_ADDR: a tensor or None, got {value!r}")
    if value.device.type != "cpu" or not value.is_contiguous():
        raise ValueError(
            f"argument {name}: a contiguous CPU tensor is needed, got strides {value.stride()} on "
            f"{value.device}; pass the storage's own tensor and strides as arguments"
        )
    return _Buffer(value.data_ptr(), value.nbytes, name.encode())


def _report(values: dict[str, Any]) -> Report:
    def pipes(side: str) -> dict[str, PipeWork]:
        return {name: PipeWork(**work) for name, work in values[side].items()}

    return Report(
        aic=pipes("aic"),
        aiv=pipes("aiv"),
        traffic={name: Traffic(**moved) for name, moved in values["buffers"].items()},
        pipe_cycles=values["pipe_cycles"],
        memory_cycles=values["memory_cycles"],
        busiest=values["busiest"],
        busiest_cycles=values["busiest_cycles"],
        bound=values["bound"],
        clock_ghz=values["clock_ghz"],
    )
