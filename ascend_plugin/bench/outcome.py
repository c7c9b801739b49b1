"""What a benchmark of operators gives, whatever it measures."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Generic, TypeVar

RowT = TypeVar("RowT")


@dataclass(frozen=True, slots=True)
class Outcome(Generic[RowT]):
    """What a run gives.

    Attributes:
        rows: one per case.
        isa: instruction set of the native kernels that ran; None when none did.
        method: how it was measured, for ``meta``.
    """

    rows: list[RowT]
    isa: str | None
    method: dict[str, object]
