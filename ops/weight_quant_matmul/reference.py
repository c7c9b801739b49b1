"""``weight_quant_matmul`` in plain torch: dequantise, then multiply."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch

from .. import packed_weight
from ..dispatch import Support

if TYPE_CHECKING:
    from . import LinearRequest


def supports(request: LinearRequest) -> Support:
    """Serve every request."""
    return Support(True, "plain torch")


def load() -> Callable[..., None]:
    """Return the kernel."""
    return matmul


def matmul(
    x: torch.Tensor,
    weight: torch.Tensor,
    scales: torch.Tensor,
    zeros: torch.Tensor | None,
    bias: torch.Tensor | None,
    out: torch.Tensor,
    group: int,
    bits: int,
    *,
    compute_dtype: torch.dtype = torch.float32,
) -> None:
    """Write the product into ``out``; arguments as in the operator.

    Args:
        x: as in the operator, like every argument not named here.
        out: ``[m, n]``; of any type.
        compute_dtype: float64 makes this the oracle.
    """
    n, k = out.shape[1], x.shape[1]
    dense = packed_weight.dequantise(weight, scales, zeros, n, k, group, bits, compute_dtype)
    product = x.to(compute_dtype) @ dense.T
    out.copy_(product if bias is None else product + bias.to(compute_dtype))
