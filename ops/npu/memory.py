"""Tensors that share memory without owning it."""

from __future__ import annotations

import torch
import torch_npu


def weak_reference(tensor: torch.Tensor) -> torch.Tensor:
    """Return a tensor over the same memory that does not keep it allocated.

    Empty tensors own nothing and come back as they are.
    """
    if tensor.numel() == 0:
        return tensor
    found: torch.Tensor = torch_npu._C._weak_ref_tensor(tensor)
    return found
