"""Contenders in turn, call by call."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch

_MIN_PAIRS = 5
_MAX_PAIRS = 20_000


@dataclass(frozen=True)
class Prepared:
    """A contender that is ready to run one case.

    Attributes:
        run: one call, on the cache of the given layer.
        layers: number of caches; all hold the same contents in different memory.
        result: what ``run`` writes for attention, ``[tokens, heads, head_dim]``; empty for write.
        caches: the plugin's pages per layer, to compare after a write; empty where the layout is
            private.
        implementation: which of the contender's implementations runs.
        isa: its instruction set, where one was chosen.
        remark: how its caches were allocated.
        last: returns the result of the last call, where each makes a new one.
    """

    run: Callable[[int], None]
    layers: int
    result: torch.Tensor
    caches: tuple[torch.Tensor, ...] = field(default=(), repr=False)
    implementation: str = ""
    isa: str | None = None
    remark: str = ""
    last: Callable[[], torch.Tensor] | None = None


@dataclass(frozen=True, slots=True)
class PairedTimes:
    """Seconds per call; entry ``i`` of all was measured one right after the other.

    Attributes:
        ours: the plugin's calls.
        stock: vLLM's; empty when it did not run.
    """

    ours: tuple[float, ...]
    stock: tuple[float, ...]

    @property
    def median(self) -> float:
        """Median seconds of our calls."""
        return statistics.median(self.ours)

    @property
    def stock_median(self) -> float | None:
        """Median seconds of stock's calls; None when it did not run."""
        return statistics.median(self.stock) if self.stock else None

    @property
    def ratio(self) -> float | None:
        """Median of stock's time over ours, pair by pair; above 1 ours is faster."""
        if not self.stock:
            return None
        return statistics.median(s / o for s, o in zip(self.stock, self.ours, strict=True))


def time_pairs(ours: Prepared, stock: Prepared | None, seconds: float) -> PairedTimes:
    """Measure for about ``seconds``: A B, B A, A B, …, each pair on the next layer's caches.

    A disturbance of a shared machine hits both halves of a pair, and the changing order gives both
    the same neighbours; so the median of the pairs' ratios stands where medians of two separate
    runs do not.

    Args:
        ours: the plugin.
        stock: vLLM, where it can run the case.
        seconds: how long.
    """
    contenders = {"ours": ours, "stock": stock}
    present = {name: one for name, one in contenders.items() if one is not None}
    times = time_turns(present, seconds)
    return PairedTimes(**{name: times.get(name, ()) for name in contenders})


def time_turns(contenders: Mapping[str, Prepared], seconds: float) -> dict[str, tuple[float, ...]]:
    """Measure any number of contenders in turns, as :func:`time_pairs` does.

    Args:
        contenders: by name.
        seconds: how long.

    Returns:
        Seconds per call; entry ``i`` of all was measured in the same turn.
    """
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for contender in contenders.values():  # faults in what is touched for the first time
        contender.run(0)
    collecting = gc.isenabled()
    gc.disable()
    try:
        end = time.perf_counter() + seconds
        turn = 0
        while turn < _MAX_PAIRS and (turn < _MIN_PAIRS or time.perf_counter() < end):
            for name in contenders if turn % 2 else reversed(list(contenders)):
                contender = contenders[name]
                run, layer = contender.run, turn % contender.layers
                start = time.perf_counter()
                run(layer)
                times[name].append(time.perf_counter() - start)
            turn += 1
    finally:
        if collecting:
            gc.enable()
    return {name: tuple(values) for name, values in times.items()}
