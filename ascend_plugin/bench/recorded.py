"""The plugin's calls as its engine makes them in steps that it has recorded."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Generic, TypeVar, cast

from ascend_plugin.graph.cpu import NotRecordable, Pool, RecordedStep, record_step
from ascend_plugin.worker.cpu_steps import MAX_TOKENS

Result = TypeVar("Result")


def is_recorded(tokens: int) -> bool:
    """Say whether the engine repeats steps of so many tokens without Python."""
    return tokens <= MAX_TOKENS


@dataclass(frozen=True, slots=True)
class _Recorded(Generic[Result]):
    """Repeats calls; keeps the one that was recorded, because steps hold no more than addresses."""

    run: Callable[[int], Result]
    steps: list[RecordedStep]

    def __call__(self, layer: int) -> Result:
        return cast(Result, self.steps[layer].repeat())


def recorded(run: Callable[[int], Result], layers: int) -> Callable[[int], Result]:
    """Return the same calls, recorded; what one returns is overwritten by the next on its layer.

    Operators without native kernels run as they are, as in the engine.

    Args:
        run: a call on the memory of a layer.
        layers: how many there are.
    """
    pool = Pool()
    try:
        return _Recorded(run, [record_step(partial(run, layer), pool) for layer in range(layers)])
    except NotRecordable:
        return run
