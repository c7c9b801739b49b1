"""Quantisation to int8 and products of int8 matrices."""

from __future__ import annotations

import torch

from ..constraints import AnyTensor, ConstraintError, require, require_dtype
from ..table import operator, write
from .matmul import zero_result

_DYNAMIC_QUANT = "docs/zh/custom_APIs/torch_npu/torch_npu-npu_dynamic_quant.md"
_QUANT_MATMUL = "docs/zh/custom_APIs/torch_npu/torch_npu-npu_quant_matmul.md"
_QUANTIZE = "docs/zh/custom_APIs/torch_npu/torch_npu-npu_quantize.md"

#: Types of the weights' scales, by the result's type and whether tokens have scales.
_SCALE_TYPES = {
    (torch.bfloat16, False): (torch.float32, torch.bfloat16),
    (torch.bfloat16, True): (torch.float32, torch.bfloat16),
    (torch.float16, True): (torch.float32,),
}
_MAX_COLUMNS = 65535

#: Of biases beside a bfloat16 result, or beside a float16 one with pertoken_scale.
_BIAS_TYPES = (torch.int32, torch.bfloat16, torch.float32)

_MAX = 127
_MIN = -128


def _quantise_rows(
    x: torch.Tensor, smooth: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantise ``[..., hidden]`` with one scale per row; rows of zeros have scale and codes 0."""
    wide = x.float()
    if smooth is not None and smooth.numel():
        wide = wide * smooth.float()
    scales = wide.abs().amax(-1) / _MAX
    inverse = torch.where(scales > 0, 1.0 / scales, 0.0)
    codes = (wide * inverse[..., None]).round().clamp(_MIN, _MAX)
    return codes.to(torch.int8), scales


def _check_dynamic_quant(x: torch.Tensor, smooth: torch.Tensor | None, *_: object) -> None:
    if x.dtype not in (torch.float16, torch.bfloat16) or x.dim() < 2:
        raise ConstraintError(
            f"x {tuple(x.shape)} {x.dtype} must be float16 or bfloat16 with two or more dimensions",
            _DYNAMIC_QUANT,
        )
    if smooth is not None and smooth.numel() and tuple(smooth.shape) != (x.shape[-1],):
        raise ConstraintError(
            f"smooth_scales {tuple(smooth.shape)} must have one per column of {tuple(x.shape)}",
            _DYNAMIC_QUANT,
        )


@operator("aclnnDynamicQuantV2", "TTTiTTT", check=_check_dynamic_quant)
def _dynamic_quant(
    x: torch.Tensor,
    smooth: torch.Tensor | None,
    groups: torch.Tensor | None,
    _dtype: int,
    codes: torch.Tensor,
    scales: torch.Tensor,
    offsets: torch.Tensor | None,
) -> None:
    if groups is not None and groups.numel():
        raise NotImplementedError("group_index is not simulated")
    if offsets is not None and offsets.numel():
        raise NotImplementedError("asymmetric quantisation is not simulated")
    quantised, scale = _quantise_rows(x, smooth)
    write(codes, quantised)
    write(scales, scale)


def _quantise(
    x: torch.Tensor, factor: torch.Tensor, offset: torch.Tensor | None, out: torch.Tensor
) -> None:
    if out.dtype != torch.int8:
        raise NotImplementedError(f"quantisation to {out.dtype} is not simulated; use int8")
    scaled = x.float() * factor
    if offset is not None and offset.numel():
        scaled = scaled + offset.float()
    write(out, scaled.round().clamp(_MIN, _MAX).to(torch.int8))


def _check_ascend_quant(
    x: torch.Tensor,
    scales: torch.Tensor,
    offset: torch.Tensor | None,
    sqrt_mode: bool,
    rounding: bytes,
    *_: object,
) -> None:
    if sqrt_mode or rounding != b"round":
        raise NotImplementedError(f"sqrt_mode {sqrt_mode}, rounding {rounding!r} are not simulated")
    if scales.dtype != x.dtype:
        raise ConstraintError(
            f"scales are {scales.dtype}; they must have the input's type {x.dtype}", _QUANTIZE
        )
    if scales.numel() not in (1, x.shape[-1]):
        raise ConstraintError(
            f"scales {tuple(scales.shape)} must be one, or one per column of {tuple(x.shape)}",
            _QUANTIZE,
        )
    if offset is not None and offset.numel():
        require(
            offset.dtype == scales.dtype and offset.shape == scales.shape,
            f"zero_points {tuple(offset.shape)} {offset.dtype} must be like scales "
            f"{tuple(scales.shape)} {scales.dtype}",
            _QUANTIZE,
        )


@operator("aclnnAscendQuantV3", "TTTbceiT", check=_check_ascend_quant)
def _ascend_quant(
    x: torch.Tensor,
    scales: torch.Tensor,
    offset: torch.Tensor | None,
    _sqrt_mode: bool,
    _rounding: bytes,
    _dtype: int,
    axis: int,
    out: torch.Tensor,
) -> None:
    """Multiply by the scales (``npu_quantize`` with ``div_mode=False``)."""
    if axis != -1:
        raise NotImplementedError(f"axis {axis} is not simulated; use -1")
    _quantise(x, scales.float(), offset, out)


@operator("aclnnQuantize", "TTTeiT")
def _quantize(
    x: torch.Tensor,
    scales: torch.Tensor,
    offset: torch.Tensor | None,
    _dtype: int,
    axis: int,
    out: torch.Tensor,
) -> None:
    """Divide by the scales (``div_mode=True``)."""
    shape = [1] * x.dim()
    if scales.numel() > 1:
        shape[axis] = -1
    spread = None if offset is None else offset.reshape(shape)
    _quantise(x, 1.0 / scales.float().reshape(shape), spread, out)


def _check_quant_matmul(
    x1: AnyTensor,
    x2: AnyTensor,
    x1_scale: torch.Tensor | None,
    x2_scale: torch.Tensor,
    *rest: object,
) -> None:
    out = rest[-1]
    assert isinstance(out, torch.Tensor)
    require_dtype(_QUANT_MATMUL, (torch.int8,), x1=x1, x2=x2)
    if max(x1.shape[-1], x2.shape[-1]) > _MAX_COLUMNS:
        raise ConstraintError(
            f"the last dimensions of x1 {tuple(x1.shape)} and x2 {tuple(x2.shape)} must not exceed "
            f"{_MAX_COLUMNS}",
            _QUANT_MATMUL,
        )
    per_token = x1_scale is not None and x1_scale.numel() > 0
    scales = _SCALE_TYPES.get((out.dtype, per_token), ())
    if x2_scale.dtype not in scales:
        raise ConstraintError(
            f"scale {x2_scale.dtype} {'with' if per_token else 'without'} pertoken_scale for "
            f"{out.dtype}; allowed: {', '.join(map(str, scales)) or 'no such result'}",
            _QUANT_MATMUL,
        )
    bias = rest[4]
    if isinstance(bias, torch.Tensor) and bias.numel():
        require_dtype(_QUANT_MATMUL, _BIAS_TYPES, bias=bias)
    if isinstance(x1_scale, torch.Tensor) and per_token:
        require_dtype(_QUANT_MATMUL, (torch.float32,), pertoken_scale=x1_scale)
        require(
            tuple(x1_scale.shape) == (x1.shape[-2],),
            f"pertoken_scale {tuple(x1_scale.shape)} must be one per row of {tuple(x1.shape)}",
            _QUANT_MATMUL,
        )
    require(x1.numel() > 0, f"x1 {tuple(x1.shape)} must not be empty", _QUANT_MATMUL)


def _quant_matmul(
    x1: torch.Tensor,
    x2: torch.Tensor,
    x1_scale: torch.Tensor | None,
    x2_scale: torch.Tensor,
    y_scale: torch.Tensor | None,
    x1_offset: torch.Tensor | None,
    x2_offset: torch.Tensor | None,
    y_offset: torch.Tensor | None,
    bias: torch.Tensor | None,
    transpose1: bool,
    transpose2: bool,
    group_size: int,
    out: torch.Tensor,
) -> None:
    unused = (y_scale, x1_offset, x2_offset, y_offset)
    if any(each is not None and each.numel() for each in unused) or group_size:
        raise NotImplementedError("offsets, output scales and groups are not simulated")
    left = x1.transpose(-1, -2) if transpose1 else x1
    right = x2.transpose(-1, -2) if transpose2 else x2
    # float64 holds every int32 sum exactly; torch has no fast integer product.
    total = torch.matmul(left.double(), right.double())
    if bias is not None and bias.numel() and bias.dtype == torch.int32:
        total = total + bias
    result = total.float() * x2_scale.float()
    if x1_scale is not None and x1_scale.numel():
        result = result * x1_scale.float().reshape(*x1_scale.shape, 1)
    if bias is not None and bias.numel() and bias.dtype != torch.int32:
        result = result + bias.float()
    write(out, result)


for _name in ("QuantMatmulV5", "QuantMatmulWeightNz"):
    _register = operator(
        f"aclnn{_name}", "TTTTTTTTTbbiT", check=_check_quant_matmul, uncomputed=zero_result
    )
    _register(_quant_matmul)
