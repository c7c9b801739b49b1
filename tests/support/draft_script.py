"""Numbers of drafts that a test dictates, instead of the policy's."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import cycle
from typing import Any


@contextmanager
def played(script: Sequence[int] | None) -> Iterator[None]:
    """Make one step after the other draft so many, again and again; None leaves it alone."""
    if script is None:
        yield
        return
    from ascend_plugin.spec_decode.policy import DraftPolicy

    original, wanted = DraftPolicy.choose, cycle(script)

    def choose(self: Any, batch: int) -> int:
        return next(wanted)

    DraftPolicy.choose = choose
    try:
        yield
    finally:
        DraftPolicy.choose = original
