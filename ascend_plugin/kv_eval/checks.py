"""Checks of what the commands are given."""

from __future__ import annotations

import math
import os

from ascend_plugin.kv_eval.errors import KVEvalError


def check_positive(option: str, value: int) -> None:
    """Refuse a number below 1.

    Raises:
        KVEvalError: it is.
    """
    if value < 1:
        raise KVEvalError(f"{option} {value} is not possible; it must be at least 1.")


def check_threshold(value: float | None) -> None:
    """Refuse a threshold that no relative error can be compared with.

    Raises:
        KVEvalError: negative or not finite.
    """
    if value is not None and not (math.isfinite(value) and value >= 0):
        raise KVEvalError(f"--threshold {value} is not possible; it must be a number >= 0.")


def use_threads(threads: int | None) -> int:
    """Make torch use so many threads, None: one per CPU; return how many.

    Raises:
        KVEvalError: more than there are CPUs, or none.
    """
    import torch

    cpus = len(os.sched_getaffinity(0))
    if threads is not None and not 1 <= threads <= cpus:
        raise KVEvalError(f"--threads {threads} is not possible. Use 1 to {cpus}.")
    torch.set_num_threads(threads or cpus)
    return threads or cpus
