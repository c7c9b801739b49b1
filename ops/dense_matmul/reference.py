"""``dense_matmul`` in plain torch: its meaning."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch

from ..dispatch import Support

if TYPE_CHECKING:
    from . import DenseRequest


def supports(request: DenseRequest) -> Support:
    """Serve every request."""
    return Support(True, "plain torch")


def load() -> Callable[..., torch.Tensor]:
    """Return the kernel."""
    return dense_matmul


def dense_matmul(
    x: torch.Tensor,
    weights: torch.Tensor,
    bias: torch.Tensor | None,
    compute_dtype: torch.dtype = torch.float32,
) -> torch.Tensor:
    """Return the product; arguments as in the operator.

    Args:
        x: as in the operator, like every argument not named here.
        weights: ``[n, k]``.
        bias: ``[n]`` or None.
        compute_dtype: of the arithmetic; float64 makes an oracle, and the result's type.
    """
    out = x.to(compute_dtype) @ weights.to(compute_dtype).t()  # [m, n]
    if bias is not None:
        out += bias.to(compute_dtype)
    return out if compute_dtype == torch.float64 else out.to(x.dtype)
