"""Two contenders in turn, call by call."""

from __future__ import annotations

import gc
import statistics
import time
from dataclasses import dataclass

from ascend_plugin.bench.attention.contenders import Prepared

_MIN_PAIRS = 5
_MAX_PAIRS = 20_000


@dataclass(frozen=True, slots=True)
class PairedTimes:
    """Seconds per call; entry ``i`` of both was measured one right after the other."""

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
    """
    contenders = [ours] if stock is None else [ours, stock]
    times: list[list[float]] = [[] for _ in contenders]
    for contender in contenders:  # faults in what is touched for the first time
        contender.run(0)
    collecting = gc.isenabled()
    gc.disable()
    try:
        end = time.perf_counter() + seconds
        pair = 0
        while pair < _MAX_PAIRS and (pair < _MIN_PAIRS or time.perf_counter() < end):
            layer = pair % ours.layers
            order = range(len(contenders)) if pair % 2 else reversed(range(len(contenders)))
            for index in order:
                run = contenders[index].run
                start = time.perf_counter()
                run(layer)
                times[index].append(time.perf_counter() - start)
            pair += 1
    finally:
        if collecting:
            gc.enable()
    return PairedTimes(tuple(times[0]), tuple(times[1]) if stock else ())
