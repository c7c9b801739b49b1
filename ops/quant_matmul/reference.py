"""``quant_matmul`` in plain torch."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch

from .. import packed_weight
from ..dispatch import Support

if TYPE_CHECKING:
    from . import Int8Request


def supports(request: Int8Request) -> Support:
    """Serve every request."""
    return Support(True, "plain torch")


def load() -> Callable[..., None]:
    """Return the kernel."""
    return matmul


def matmul(
    x: torch.Tensor,
    weight: torch.Tensor,
    column_sums: torch.Tensor,
    weight_scale: torch.Tensor,
    x_scale: torch.Tensor,
    x_zero: torch.Tensor | None,
    quant_bias: torch.Tensor | None,
    bias: torch.Tensor | None,
    out: torch.Tensor,
) -> None:
    """Write the product into ``out`` ``[m, n]``; arguments as in the operator."""
    n, k = out.shape[1], x.shape[1]
    codes = packed_weight.unpack_codes(weight, n, k, 8)
    exact = x.int() @ codes.int().T
    if x_zero is not None:
        exact -= x_zero[:, None] * column_sums[:n]
    if quant_bias is not None:
        exact += quant_bias
    scaled = exact.float() * (x_scale[:, None] * weight_scale)
    out.copy_(scaled if bias is None else scaled + bias.float())
