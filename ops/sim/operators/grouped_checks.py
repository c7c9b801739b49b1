"""What grouped matrix products refuse.

Sources: op-plugin's page of the operator, and for what it leaves open that of
``aclnnGroupedMatmulV5`` in CANN's ops-transformer, by types of inputs and weights.
"""

from __future__ import annotations

from typing import Any

import torch

from ..arguments import FractalTensor
from ..constraints import (
    AnyTensor,
    ConstraintError,
    require,
    require_contiguous,
    require_dtype,
)

_PAGE = "docs/zh/custom_APIs/torch_npu/torch_npu-npu_grouped_matmul.md"
_ACLNN = "ops-transformer gmm/grouped_matmul/docs/aclnnGroupedMatmulV5.md"

_INNER_LIMIT, _MAX_MATRICES, _MAX_GROUPS = 65536, 128, 1024
_COUNTED = 1
_PER_WORD = 8

_FLOATS = (torch.bfloat16, torch.float16)


def check_grouped(x: list[torch.Tensor], weights: list[AnyTensor], *rest: Any) -> None:
    """Check aclnnGroupedMatmulV5 and aclnnGroupedMatmulWeightNz."""
    bias, group_list, list_type = rest[0], rest[6], rest[12]
    require(
        len(x) <= _MAX_MATRICES and len(weights) <= _MAX_MATRICES,
        f"{len(x)} x and {len(weights)} weights; at most {_MAX_MATRICES} each",
        _PAGE,
    )
    for each in x:
        _check_inner("x", each)
    for weight in weights:
        _check_inner("weight", weight)
    require_contiguous(_PAGE, **{f"x[{i}]": each for i, each in enumerate(x)})
    if group_list is not None:
        require_dtype(_PAGE, (torch.int64,), group_list=group_list)
        if list_type == _COUNTED:
            require(group_list.numel() != 1, "a group_list of counts must not be of one", _PAGE)
        require(
            group_list.shape[0] <= _MAX_GROUPS,
            f"{group_list.shape[0]} groups; at most {_MAX_GROUPS}",
            _ACLNN,
        )
    integers = x[0].dtype == torch.int8
    for each in bias or []:
        if _present(each) and x[0].dtype == torch.bfloat16:
            require_dtype(_PAGE, (torch.float32,), bias=each)
        elif _present(each) and integers:
            require_dtype(_ACLNN, (torch.int32,), bias=each)
    _check_scales(x[0], weights, *rest[1:6], out=rest[15][0])


def _present(tensor: Any) -> bool:
    return tensor is not None and tensor.numel() > 0


def _first(tensors: list[Any] | None) -> Any:
    return next((each for each in tensors or [] if _present(each)), None)


def _check_scales(
    x: torch.Tensor,
    weights: list[AnyTensor],
    scale: list[Any] | None,
    _offset: Any,
    factor: list[Any] | None,
    point: list[Any] | None,
    token_scale: list[Any] | None,
    *,
    out: torch.Tensor,
) -> None:
    weight = weights[0]
    if x.dtype == torch.int8:
        require(
            weight.dtype == torch.int8 and len(weights) == 1 and len(weight.shape) == 3,
            "beside int8 x the simulator has int8 weights [experts, K, N] alone",
            _ACLNN,
        )
        _check_int8(x, weight, _first(scale), _first(token_scale), out)
    elif weight.dtype in (torch.int8, torch.int32):
        require_dtype(_PAGE, _FLOATS, x=x)
        require(not isinstance(weight, FractalTensor), "weights must be in ND format", _ACLNN)
        _check_antiquant(x, weights, _first(factor), _first(point))
    else:
        require(
            not any(_first(each) is not None for each in (scale, factor, point, token_scale)),
            "float weights take no scales",
            _PAGE,
        )


def _check_int8(
    x: torch.Tensor, weight: AnyTensor, scale: Any, token_scale: Any, out: torch.Tensor
) -> None:
    in_nz = isinstance(weight, FractalTensor)
    if out.dtype == torch.bfloat16:
        allowed = (torch.float32, torch.bfloat16) if in_nz else (torch.bfloat16,)
    elif out.dtype == torch.float16:
        allowed = (torch.float32,)
    else:
        raise ConstraintError(f"a result of {out.dtype} is not simulated", _ACLNN)
    require(scale is not None, "int8 weights need scales", _ACLNN)
    require_dtype(_ACLNN, allowed, scale=scale)
    _expect("scale", scale, (weight.shape[0], weight.shape[2]))
    if token_scale is not None:
        require_dtype(_PAGE, (torch.float32,), per_token_scale=token_scale)
        _expect("per_token_scale", token_scale, (x.shape[0],))


def _check_antiquant(x: torch.Tensor, weights: list[AnyTensor], factor: Any, point: Any) -> None:
    weight = weights[0]
    require(factor is not None and point is not None, "scale and offset are both needed", _ACLNN)
    require_dtype(_PAGE, (x.dtype,), antiquant_scale=factor, antiquant_offset=point)
    require(factor.shape == point.shape, "antiquant_offset must have scale's shape", _PAGE)
    require(len(weights) == 1 and len(weight.shape) == 3, "one weight [experts, K, N]", _ACLNN)
    experts, k, n = weight.shape
    if weight.dtype == torch.int32:
        n *= _PER_WORD
    require(x.shape[1] == k, f"x {tuple(x.shape)} for weights of {k} input features", _PAGE)
    if factor.dim() == 2:
        _expect("antiquant_scale", factor, (experts, n))
        return
    require(weight.dtype == torch.int32, "groups are for 4-bit weights alone", _PAGE)
    require(k % factor.shape[1] == 0, f"{factor.shape[1]} groups must divide {k}", _PAGE)
    _expect("antiquant_scale", factor, (experts, factor.shape[1], n))


def check_points(point: list[Any] | None) -> None:
    """Refuse zero points of groups, which are documented per column alone.

    Read at the launch: phase 1 must not look at what tensors hold.
    """
    found = _first(point)
    if found is not None and found.dim() == 3 and bool(found.any()):
        raise ConstraintError("zero points of groups; only those of columns are listed", _ACLNN)


def _expect(name: str, tensor: Any, shape: tuple[int, ...]) -> None:
    require(tuple(tensor.shape) == shape, f"{name} {tuple(tensor.shape)} must be {shape}", _ACLNN)


def _check_inner(name: str, tensor: AnyTensor) -> None:
    """Refuse a last dimension (the one before it of a transposed tensor) beyond the limit."""
    if tensor.shape and tensor.shape[-1] >= _INNER_LIMIT:
        raise ConstraintError(
            f"{name} {tuple(tensor.shape)}: the inner dimension must be below {_INNER_LIMIT}",
            _PAGE,
        )
