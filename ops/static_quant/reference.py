"""``static_quant`` in plain torch: its meaning, to the bit."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch

from ..dispatch import Support

if TYPE_CHECKING:
    from . import StaticRequest

#: The range of codes.
LOW, HIGH = -128, 127


def supports(request: StaticRequest) -> Support:
    """Serve every request."""
    return Support(True, "plain torch")


def load() -> Callable[..., None]:
    """Return the kernel."""
    return static_quant


def static_quant(
    x: torch.Tensor, factor: torch.Tensor, zero: torch.Tensor, codes: torch.Tensor
) -> None:
    """Write the codes; arguments as in the operator."""
    codes.copy_(quantise(x, factor, zero))


def quantise(x: torch.Tensor, factor: torch.Tensor, zero: torch.Tensor) -> torch.Tensor:
    """Return the codes int8 ``[m, k]``; as in the operator."""
    scaled = x.to(torch.float32) * factor.to(torch.float32) + zero.to(torch.float32)
    # Processors disagree on what integer a NaN becomes.
    return scaled.round_().clamp_(LOW, HIGH).nan_to_num_(0.0).to(torch.int8)
