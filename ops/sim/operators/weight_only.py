"""Products of floats with weights of int8 or int4, which the operator multiplies out first."""

from __future__ import annotations

import torch

from ..arguments import FractalTensor
from ..constraints import AnyTensor, require, require_dtype
from ..table import operator, write
from .matmul import zero_result

_DOCS = "docs/zh/custom_APIs/torch_npu/torch_npu-npu_weight_quant_batchmatmul.md"

_FLOATS = (torch.bfloat16, torch.float16)
_MAX_FEATURES = 65535
_GROUP_STEP = 32
_PER_WORD = 8

#: Of a bias, by the type of x.
_BIAS = {torch.bfloat16: torch.float32, torch.float16: torch.float16}


def unpack_int4(words: torch.Tensor, transposed: bool = False) -> torch.Tensor:
    """Return the int8 codes of int32 words, the lowest bits first.

    Args:
        words: ``[..., rows, columns / 8]``; transposed: ``[..., rows / 8, columns]``.
        transposed: whether memory holds the transpose, whose rows are packed.
    """
    if transposed:
        return unpack_int4(words.transpose(-1, -2)).transpose(-1, -2)
    codes = torch.stack([(words << (28 - 4 * i)) >> 28 for i in range(_PER_WORD)], -1)
    return codes.flatten(-2).to(torch.int8)


def is_transposed(tensor: torch.Tensor) -> bool:
    """Say whether the last two dimensions lie in memory in the other order."""
    return tensor.shape[-1] > 1 and tensor.stride(-1) != 1 and tensor.stride(-2) == 1


def _check(
    x: torch.Tensor,
    weight: AnyTensor,
    scale: torch.Tensor,
    offset: torch.Tensor | None,
    quant_scale: torch.Tensor | None,
    quant_offset: torch.Tensor | None,
    bias: torch.Tensor | None,
    group_size: int,
    *_: object,
) -> None:
    require_dtype(_DOCS, _FLOATS, x=x)
    require_dtype(_DOCS, (torch.int8, torch.int32), weight=weight)
    if isinstance(weight, FractalTensor):
        require(False, "weight in NZ format is for whole graphs, not for single operators", _DOCS)
        return
    require(x.dim() == 2 and weight.dim() == 2, "x and weight must have two dimensions", _DOCS)
    require(x.numel() > 0, f"x {tuple(x.shape)} must not be empty", _DOCS)
    require(
        x.is_contiguous() or x.t().is_contiguous(),
        f"x {tuple(x.shape)} with strides {x.stride()} is neither whole nor a transpose",
        _DOCS,
    )
    k, n = weight.shape
    if weight.dtype == torch.int32:
        k, n = (k * _PER_WORD, n) if is_transposed(weight) else (k, n * _PER_WORD)
    require(x.shape[1] == k, f"x {tuple(x.shape)} and weight of {k} input features", _DOCS)
    require(
        max(k, n) <= _MAX_FEATURES, f"{k} and {n} features; at most {_MAX_FEATURES} each", _DOCS
    )
    groups = _check_groups(k, group_size)
    allowed = [(n,), (1, n), (1,), (1, 1)] if groups is None else [(groups, n)]
    for name, values in (("antiquant_scale", scale), ("antiquant_offset", offset)):
        if values is None or not values.numel():
            continue
        require_dtype(_DOCS, (x.dtype,), **{name: values})
        require(
            tuple(values.shape) in allowed,
            f"{name} {tuple(values.shape)} for {k} input and {n} output features, group size "
            f"{group_size}; allowed: {', '.join(map(str, allowed))}",
            _DOCS,
        )
    if offset is not None and offset.numel():
        require(offset.shape == scale.shape, "antiquant_offset must have scale's shape", _DOCS)
    if bias is not None and bias.numel():
        require_dtype(_DOCS, (_BIAS[x.dtype],), bias=bias)
        require(tuple(bias.shape) in ((n,), (1, n)), f"bias {tuple(bias.shape)} for {n}", _DOCS)


def _check_groups(k: int, group_size: int) -> int | None:
    """Return how many groups there are; None: one scale per column, or for all."""
    if group_size == 0:
        return None
    require(
        _GROUP_STEP <= group_size <= k - 1 and group_size % _GROUP_STEP == 0,
        f"antiquant_group_size {group_size}: 0, or a multiple of {_GROUP_STEP} up to {k - 1}",
        _DOCS,
    )
    return -(-k // group_size)


@operator("aclnnWeightQuantBatchMatmulV2", "TTTTTTTiT", check=_check, uncomputed=zero_result)
def _weight_quant_matmul(
    x: torch.Tensor,
    weight: torch.Tensor,
    scale: torch.Tensor,
    offset: torch.Tensor | None,
    quant_scale: torch.Tensor | None,
    quant_offset: torch.Tensor | None,
    bias: torch.Tensor | None,
    group_size: int,
    out: torch.Tensor,
) -> None:
    """Multiply ``[tokens, K]`` by codes ``[K, N]`` with scales ``[N]``, or per group of rows."""
    if any(each is not None and each.numel() for each in (quant_scale, quant_offset)):
        raise NotImplementedError("a quantised result is not simulated")
    if weight.dtype == torch.int32:
        weight = unpack_int4(weight, is_transposed(weight))
    wide = dequantise(weight, scale, offset, group_size, x.dtype)
    result = x.float() @ wide
    if bias is not None and bias.numel():
        result = result + bias.float()
    write(out, result)


def dequantise(
    codes: torch.Tensor,
    scale: torch.Tensor,
    offset: torch.Tensor | None,
    group_size: int,
    dtype: torch.dtype,
) -> torch.Tensor:
    """Return ``(codes + offset) * scale`` as float32 ``[K, N]``, rounded to the cube's type."""
    wide = codes.float()
    if offset is not None and offset.numel():
        wide = wide + _per_row(offset, codes, group_size)
    return (wide * _per_row(scale, codes, group_size)).to(dtype).float()


def _per_row(values: torch.Tensor, codes: torch.Tensor, group_size: int) -> torch.Tensor:
    """Return ``values`` as float32 that broadcast against ``[K, N]``."""
    wide = values.float()
    if group_size:
        return wide.repeat_interleave(group_size, 0)[: codes.shape[0]]
    return wide.reshape(1, -1)
