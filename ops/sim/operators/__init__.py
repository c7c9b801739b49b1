"""The simulated aclnn operators, by domain.

Importing this registers them; :mod:`..bind` hands them to the C++ runtime.
"""

from __future__ import annotations

from . import (
    activations,
    attention,
    elementwise,
    grouped,
    indexing,
    kv_cache,
    matmul,
    moe,
    normalise,
    quantised,
    random,
    reductions,
    rotary,
    sampling,
    weight_only,
)

__all__ = [
    "activations",
    "attention",
    "elementwise",
    "grouped",
    "indexing",
    "kv_cache",
    "matmul",
    "moe",
    "normalise",
    "quantised",
    "random",
    "reductions",
    "rotary",
    "sampling",
    "weight_only",
]
