"""``add_rms_norm`` in plain torch: its meaning."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch

from ..dispatch import Support

if TYPE_CHECKING:
    from . import NormRequest


def supports(request: NormRequest) -> Support:
    """Serve every request."""
    return Support(True, "plain torch")


def load() -> Callable[..., None]:
    """Return the kernel."""
    return add_rms_norm


def add_rms_norm(
    x: torch.Tensor,
    residual: torch.Tensor | None,
    weight: torch.Tensor,
    epsilon: float,
    out: torch.Tensor,
    compute_dtype: torch.dtype = torch.float32,
) -> None:
    """Write ``residual`` and ``out``; arguments as in the operator.

    Args:
        x: as in the operator, like every argument not named here.
        out: shape and type of ``x``.
        compute_dtype: of the arithmetic; float64 makes an oracle.
    """
    total = x.to(compute_dtype)  # [m, k]
    if residual is not None:
        total = total + residual.to(compute_dtype)
        residual.copy_(total)
    scale = torch.rsqrt(total.square().mean(-1, keepdim=True) + epsilon)
    out.copy_(total * scale * weight.to(compute_dtype))
