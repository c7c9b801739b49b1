"""Coverage, where it would cost time and find nothing."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def unmeasured() -> Iterator[None]:
    """Measure no coverage meanwhile, if this process does: code takes half as long again by it."""
    current = "coverage" in sys.modules and sys.modules["coverage"].Coverage.current()
    if current:
        current.stop()
    try:
        yield
    finally:
        if current:
            current.start()
