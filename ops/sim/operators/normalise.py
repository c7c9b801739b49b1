"""RMS and layer norms.

Sums are float32. The RMS norm of 16-bit types rounds the normalised row before it multiplies by
gamma, as the kernels of CANN's ops-nn do (and Llama's reference).
"""

from __future__ import annotations

import torch

from ..constraints import ConstraintError
from ..table import operator, write

_RMS_NORM = "docs/zh/custom_APIs/torch_npu, npu_rms_norm"
_ADD_RMS_NORM = "docs/zh/custom_APIs/torch_npu/torch_npu-npu_add_rms_norm.md"


def rms_norm(
    x: torch.Tensor, gamma: torch.Tensor, epsilon: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Normalise the dimensions of ``gamma``.

    Args:
        x: ``[..., hidden]``.
        gamma: ``[hidden]``, or the last dimensions of ``x``.
        epsilon: added to the mean of squares.

    Returns:
        The result in ``x``'s type, and the reciprocal norms, float32 ``[..., 1]``.
    """
    wide = x.float()
    dims = tuple(range(-gamma.dim(), 0))
    rstd = torch.rsqrt(wide.square().mean(dims, keepdim=True) + epsilon)
    normal = (wide * rstd).to(x.dtype)
    return (normal.float() * gamma.float()).to(x.dtype), rstd


def _check_rms_norm(x: torch.Tensor, gamma: torch.Tensor, *_: object) -> None:
    if tuple(gamma.shape) != tuple(x.shape[-gamma.dim() :]):
        raise ConstraintError(
            f"gamma {tuple(gamma.shape)} must be the last dimensions of {tuple(x.shape)}",
            _RMS_NORM,
        )


@operator("aclnnRmsNorm", "TTdTT", check=_check_rms_norm)
def _rms_norm(
    x: torch.Tensor, gamma: torch.Tensor, epsilon: float, out: torch.Tensor, rstd: torch.Tensor
) -> None:
    result, scale = rms_norm(x, gamma, epsilon)
    write(out, result)
    rstd.copy_(scale.view(rstd.shape))


@operator("aclnnGemmaRmsNorm", "TTdTT")
def _gemma_rms_norm(
    x: torch.Tensor, gamma: torch.Tensor, epsilon: float, out: torch.Tensor, rstd: torch.Tensor
) -> None:
    wide = x.float()
    scale = torch.rsqrt(wide.square().mean(-1, keepdim=True) + epsilon)
    write(out, wide * scale * (1.0 + gamma.float()))
    rstd.copy_(scale.view(rstd.shape))


def _check_add(x1: torch.Tensor, x2: torch.Tensor, gamma: torch.Tensor, *_: object) -> None:
    if not (x1.dtype == x2.dtype == gamma.dtype) or x1.shape != x2.shape:
        raise ConstraintError(
            f"x1 {tuple(x1.shape)} {x1.dtype}, x2 {tuple(x2.shape)} {x2.dtype} and gamma "
            f"{gamma.dtype} must have one type, x1 and x2 one shape",
            _ADD_RMS_NORM,
        )
    if tuple(gamma.shape) != tuple(x1.shape[-gamma.dim() :]):
        raise ConstraintError(
            f"gamma {tuple(gamma.shape)} must be the last dimensions of {tuple(x1.shape)}",
            _ADD_RMS_NORM,
        )


@operator("aclnnAddRmsNorm", "TTTdTTT", check=_check_add)
def _add_rms_norm(
    x1: torch.Tensor,
    x2: torch.Tensor,
    gamma: torch.Tensor,
    epsilon: float,
    out: torch.Tensor,
    rstd: torch.Tensor,
    total: torch.Tensor,
) -> None:
    added = x1 + x2
    result, scale = rms_norm(added, gamma, epsilon)
    write(out, result)
    rstd.copy_(scale.view(rstd.shape))
    write(total, added)


@operator("aclnnInplaceAddRmsNorm", "TTTdT")
def _add_rms_norm_in_place(
    x1: torch.Tensor, x2: torch.Tensor, gamma: torch.Tensor, epsilon: float, rstd: torch.Tensor
) -> None:
    """``x1`` becomes the normalised sum, ``x2`` the sum."""
    _add_rms_norm(x1, x2, gamma, epsilon, x1, rstd, x2)


@operator("aclnnAddRmsNormCast", "TTTdTTTT")
def _add_rms_norm_cast(
    x1: torch.Tensor,
    x2: torch.Tensor,
    gamma: torch.Tensor,
    epsilon: float,
    wide: torch.Tensor,
    out: torch.Tensor,
    rstd: torch.Tensor,
    total: torch.Tensor,
) -> None:
    _add_rms_norm(x1, x2, gamma, epsilon, out, rstd, total)
    write(wide, out)


@operator("aclnnLayerNorm", "TATTdTTT")
def _layer_norm(
    x: torch.Tensor,
    shape: list[int],
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    epsilon: float,
    out: torch.Tensor,
    mean: torch.Tensor | None,
    rstd: torch.Tensor | None,
) -> None:
    wide = x.float()
    dims = tuple(range(-len(shape), 0))
    average = wide.mean(dims, keepdim=True)
    centred = wide - average
    scale = torch.rsqrt(centred.square().mean(dims, keepdim=True) + epsilon)
    result = centred * scale
    if weight is not None:
        result = result * weight.float()
    if bias is not None:
        result = result + bias.float()
    write(out, result)
    for kept, value in ((mean, average), (rstd, scale)):
        if kept is not None and kept.numel():
            kept.copy_(value.view(kept.shape))
