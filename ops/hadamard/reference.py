"""``hadamard`` in plain torch."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch

from ..dispatch import Support
from ..quantise import rotate

if TYPE_CHECKING:
    from . import HadamardRequest


def supports(request: HadamardRequest) -> Support:
    """Serve every request."""
    return Support(True, "plain torch")


def load() -> Callable[..., None]:
    """Return the kernel."""
    return hadamard


def hadamard(
    x: torch.Tensor,
    base: torch.Tensor | None,
    out: torch.Tensor,
    block: int,
    scale: float,
    *,
    compute_dtype: torch.dtype = torch.float32,
) -> None:
    """Write the rotated rows into ``out``; arguments as in the operator.

    Args:
        x: as in the operator, like every argument not named here.
        out: ``[m, d]``, of any type.
        compute_dtype: float64 makes this the oracle.
    """
    order = 1 if base is None else base.shape[0]
    # [m, blocks, order, a power of two]; rotate mixes powers of two.
    parts = x.to(compute_dtype).unflatten(1, (-1, order, block // order))
    mixed = rotate(parts)
    if base is not None:
        mixed = base.to(compute_dtype) @ mixed
    out.copy_(mixed.flatten(1) * scale)
