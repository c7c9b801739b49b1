"""Shape of attention."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Geometry:
    """Shape of one layer's attention."""

    heads: int
    kv_heads: int
    head_dim: int
