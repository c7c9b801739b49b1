"""Gated activations: computed in float32, rounded once."""

from __future__ import annotations

import torch

from ..constraints import require
from ..table import operator, write

_SWIGLU = "docs/zh/custom_APIs/torch_npu, npu_swiglu"


def _check_swiglu(x: torch.Tensor, dim: int, _out: torch.Tensor) -> None:
    require(
        x.shape[dim] % 2 == 0,
        f"dimension {dim} of {tuple(x.shape)} is cut into two halves and must be even",
        _SWIGLU,
    )


@operator("aclnnSwiGlu", "TiT", check=_check_swiglu)
def _swiglu(x: torch.Tensor, dim: int, out: torch.Tensor) -> None:
    gate, up = x.float().chunk(2, dim)
    write(out, torch.nn.functional.silu(gate) * up)
