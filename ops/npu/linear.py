"""Matrix products with weights in the cube unit's own order."""

from __future__ import annotations

import torch
import torch_npu

from ..dense_matmul import check_dense

#: ``aclFormat``: fractals of 16 rows of 32 bytes.
FORMAT_NZ = 29

#: The cube unit's fractals: rows and columns of 16-bit weights are padded to whole ones.
_FRACTAL = 16


def to_nz(weight: torch.Tensor) -> torch.Tensor:
    """Return ``[out, in]`` weights with their elements in NZ order; shape and values stay.

    Products then read fractals as they lie instead of re-ordering them in every call. Weights that
    are no whole fractals, or no 16-bit floats, come back as they are.
    """
    whole = weight.dim() == 2 and all(size % _FRACTAL == 0 for size in weight.shape)
    if not whole or weight.dtype not in (torch.bfloat16, torch.float16):
        return weight
    # torch_npu keeps tensors in private formats only when it is allowed to.
    torch_npu.npu.config.allow_internal_format = True
    out: torch.Tensor = torch_npu.npu_format_cast(weight.contiguous(), FORMAT_NZ)
    return out


def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """Return ``x @ weight.T + bias``; ``weight`` as :func:`to_nz` returned it, or plain."""
    return torch.nn.functional.linear(x, weight, bias)


def dense_matmul(
    x: torch.Tensor, weights: torch.Tensor, bias: torch.Tensor | None = None
) -> torch.Tensor:
    """Serve ``ascend_plugin::dense_matmul`` on an NPU; arguments and errors as there."""
    check_dense(x, weights, bias)
    if not x.shape[0]:
        return x.new_empty((0, weights.shape[0]))
    return linear(x, weights, bias)
