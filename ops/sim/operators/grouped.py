"""Products per expert: runs of rows, each with a weight of its own."""

from __future__ import annotations

from typing import Any

import torch

from ..table import operator, write
from .grouped_checks import check_grouped, check_points
from .matmul import product
from .weight_only import dequantise, is_transposed, unpack_int4

#: Meaning of ``group_list``: sums of the rows up to each expert, or rows of each.
_CUMULATED, _COUNTED = 0, 1


def _bounds(group_list: torch.Tensor, kind: int) -> list[int]:
    if kind not in (_CUMULATED, _COUNTED):
        raise NotImplementedError(f"group_list_type {kind} is not simulated; use 0 or 1")
    sums = group_list if kind == _CUMULATED else group_list.cumsum(0)
    return [int(each) for each in sums.tolist()]


def _given(tensors: list[torch.Tensor] | None) -> list[torch.Tensor]:
    return [each for each in tensors or [] if each is not None and each.numel()]


def _grouped_matmul(
    x: list[torch.Tensor],
    weights: list[torch.Tensor],
    bias: list[torch.Tensor] | None,
    scale: list[torch.Tensor] | None,
    offset: list[torch.Tensor] | None,
    antiquant_scale: list[torch.Tensor] | None,
    antiquant_offset: list[torch.Tensor] | None,
    token_scale: list[torch.Tensor] | None,
    group_list: torch.Tensor,
    activation: list[torch.Tensor] | None,
    activation_scale: list[torch.Tensor] | None,
    activation_offset: list[torch.Tensor] | None,
    _split_item: int,
    group_type: int,
    list_type: int,
    act_type: int,
    _tuning: list[int] | None,
    out: list[torch.Tensor],
    _act_out: list[torch.Tensor] | None,
    _dynamic_scale: list[torch.Tensor] | None,
) -> None:
    """Multiply runs of rows ``[rows, K]`` by a weight each, ``[experts, K, N]`` or a list."""
    unknown = (offset, activation, activation_scale, activation_offset)
    if any(_given(each) for each in unknown) or act_type or group_type != 0:
        raise NotImplementedError(
            "grouped products with offsets of the result, activations, or group types other than 0 "
            f"(rows) are not simulated (group_type {group_type}, act_type {act_type})"
        )
    check_points(antiquant_offset)
    matrices = list(weights[0]) if len(weights) == 1 and weights[0].dim() == 3 else weights
    count = len(matrices)
    scales, added = _rows_of(scale, count), _rows_of(bias, count)
    factors, points = _rows_of(antiquant_scale, count), _rows_of(antiquant_offset, count)
    start, tokens = 0, _given(token_scale)
    for expert, end in enumerate(_bounds(group_list, list_type)):
        if end > start:
            matrix = matrices[expert]
            if factors:
                matrix = _multiplied_out(matrix, factors[expert], points[expert], x[0].dtype)
            result = _expert_product(x[0][start:end], matrix)
            bias_here = added[expert] if added else None
            rows = tokens[0][start:end] if tokens else None
            result = _scaled(result, bias_here, scales[expert] if scales else None, rows)
            write(out[0][start:end], result)
        start = max(start, end)


def _scaled(
    product: torch.Tensor,
    bias: torch.Tensor | None,
    scale: torch.Tensor | None,
    rows: torch.Tensor | None,
) -> torch.Tensor:
    """Return the product with its scales; integers are added before them, floats after."""
    before = bias is not None and bias.dtype == torch.int32
    if bias is not None and before:
        product = product + bias.float()
    if scale is not None:
        product = product * scale.float()
    if rows is not None:
        product = product * rows[:, None]
    return product if bias is None or before else product + bias.float()


def _multiplied_out(
    weight: torch.Tensor, scale: torch.Tensor, offset: torch.Tensor, dtype: torch.dtype
) -> torch.Tensor:
    """Return one expert's float weight ``[K, N]``; scales are ``[N]`` or ``[groups, N]``."""
    codes = weight
    if weight.dtype == torch.int32:
        codes = unpack_int4(weight, is_transposed(weight))
    group = 0 if scale.dim() == 1 else codes.shape[0] // scale.shape[0]
    return dequantise(codes, scale, offset, group, dtype).to(dtype)


def _rows_of(tensors: list[torch.Tensor] | None, count: int) -> list[torch.Tensor]:
    """Return one tensor per expert, from a list or from one tensor ``[experts, …]``."""
    given = _given(tensors)
    return list(given[0]) if len(given) == 1 and count > 1 else given


def _expert_product(rows: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    if rows.dtype == torch.int8:
        return torch.matmul(rows.double(), weight.double()).float()  # exact
    return product(rows, weight)


def _zero_results(*args: Any) -> None:
    """Clear the results, the third argument from the end, instead of computing them."""
    for each in args[-3]:
        each.zero_()


_register = operator(
    "aclnnGroupedMatmulV5",
    "LLLLLLLLTLLLiiiiALLL",
    check=check_grouped,
    uncomputed=_zero_results,
)
_register(_grouped_matmul)


def _check_in_nz_order(*args: Any) -> None:
    check_grouped(*args[:17], *args[18:])


@operator(
    "aclnnGroupedMatmulWeightNz",
    "LLLLLLLLTLLLiiiiAiLLL",
    check=_check_in_nz_order,
    uncomputed=_zero_results,
)
def _grouped_matmul_in_nz_order(*args: Any) -> None:
    """Multiply by weights in NZ order; ``quantGroupSize`` is for int4 beside int8."""
    if args[17]:
        raise NotImplementedError(f"quantGroupSize {args[17]} is not simulated")
    _grouped_matmul(*args[:17], *args[18:])
