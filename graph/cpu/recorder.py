"""Records a step."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from ascend_plugin.ops import native
from ascend_plugin.ops.library import NAMESPACE, cpu_kernel
from ascend_plugin.ops.native.steps import Program, record

from .lowering import LOWERINGS, NotRecordable, Recording, storage_of
from .pool import Pool

#: Operators whose results share their argument's memory.
_VIEWS = frozenset(
    f"aten::{name}"
    for name in (
        "alias",
        "as_strided",
        "chunk",
        "detach",
        "diagonal",
        "expand",
        "expand_as",
        "flatten",
        "narrow",
        "permute",
        "resolve_conj",
        "resolve_neg",
        "select",
        "slice",
        "split",
        "split_with_sizes",
        "squeeze",
        "t",
        "transpose",
        "unbind",
        "unflatten",
        "unsqueeze",
        "view",
        "view_as",
    )
)

#: Runs an operator's Python code with the recorder on; by qualified name.
Inlined = Mapping[str, Callable[..., Any]]


@dataclass(frozen=True, slots=True)
class RecordedStep:
    """A step that can be repeated.

    Attributes:
        program: its native calls.
        output: what the recorded function returned; every repetition overwrites it.
        pool: the memory that its calls use; kept, because they hold addresses alone.
    """

    program: Program
    output: Any
    pool: Pool

    def repeat(self) -> Any:
        """Run the step on what its inputs hold now; return its output."""
        self.program.run()
        return self.output


def record_step(
    function: Callable[[], Any], pool: Pool, inlined: Inlined | None = None
) -> RecordedStep:
    """Run a function, and note what it takes to run it again.

    Args:
        function: computes on tensors whose addresses stay; its results are valid.
        pool: where its memory comes from.
        inlined: operators whose Python code shall run under the recorder.

    Raises:
        NotRecordable: it does something that is no native call. What it had written until then
            is written.
    """
    lib = native.load()
    with record(lib) as steps, Recorder(pool, inlined or {}):
        output = function()
    return RecordedStep(Program(lib, steps), output, pool)


class Recorder(TorchDispatchMode):
    """Lets a step do only what can be repeated."""

    def __init__(self, pool: Pool, inlined: Inlined) -> None:
        """Record into ``pool``; arguments as in :func:`record_step`."""
        super().__init__()
        self._recording = Recording(pool)
        self._inlined = inlined

    def __torch_dispatch__(
        self,
        func: torch._ops.OpOverload,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Pass, replace, look into or refuse one operator."""
        kwargs = kwargs or {}
        name = func._schema.name
        if name in _VIEWS:
            return func(*args, **kwargs)
        self._refuse_what_is_no_step(name, args)
        inner = self._inlined.get(name)
        if inner is None and name.startswith(NAMESPACE):
            inner = cpu_kernel(name)
        if inner is not None:
            with self:
                return inner(*args, **kwargs)
        lowering = LOWERINGS.get(str(func))
        if lowering is None:
            raise NotRecordable(f"{func} has no native kernel")
        return lowering(self._recording, *args, **kwargs)

    def _refuse_what_is_no_step(self, name: str, args: tuple[Any, ...]) -> None:
        """Refuse to compute on what was computed while recording alone.

        Raises:
            NotRecordable: an argument of the operator would not follow its inputs.
        """
        for values, reader in (
            (self._recording.widened, "aten::embedding"),
            (self._recording.masks, "aten::where"),
        ):
            if values and name != reader and not _storages(args).isdisjoint(values):
                raise NotRecordable(f"{name} of converted token ids or of a mask")


def _storages(arguments: tuple[Any, ...]) -> set[int]:
    tensors = itertools.chain.from_iterable(
        each if isinstance(each, (list, tuple)) else (each,) for each in arguments
    )
    return {storage_of(each) for each in tensors if isinstance(each, torch.Tensor)}
