"""``static_quant`` in plain torch: its meaning."""

from __future__ import annotations

import torch

#: The range of codes.
LOW, HIGH = -128, 127


def static_quant(x: torch.Tensor, factor: torch.Tensor, zero: torch.Tensor) -> torch.Tensor:
    """Return the codes; arguments as in the operator."""
    scaled = x.to(torch.float32) * factor.to(torch.float32) + zero.to(torch.float32)
    return scaled.round_().clamp_(LOW, HIGH).to(torch.int8)
