"""Errors of the benchmarks."""

from __future__ import annotations


class BenchError(RuntimeError):
    """A benchmark cannot run as asked; the message names the value, the bounds and the remedy."""
