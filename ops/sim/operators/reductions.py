"""Reductions, scans, sorting and softmax.

Sums and softmax of 16-bit types accumulate in float32 and round once, as the vector unit does.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from ..arguments import ResizedTensor
from ..table import operator, write

_SHORT = (torch.bfloat16, torch.float16)


def _all_dims(dims: list[int] | None, tensor: torch.Tensor) -> list[int]:
    """Return the dimensions of a reduction: none given means all."""
    return dims or list(range(tensor.dim()))


def _wide(tensor: torch.Tensor) -> torch.Tensor:
    """Return 16-bit floats as float32."""
    return tensor.float() if tensor.dtype in _SHORT else tensor


@operator("aclnnMean", "TAbeT")
def _mean(
    tensor: torch.Tensor, dims: list[int], keepdim: bool, _dtype: int, out: torch.Tensor
) -> None:
    wide = tensor if tensor.is_floating_point() else tensor.to(out.dtype)
    write(out, _wide(wide).mean(_all_dims(dims, tensor), keepdim))


@operator("aclnnReduceSum", "TAbeT")
def _sum(
    tensor: torch.Tensor, dims: list[int], keepdim: bool, _dtype: int, out: torch.Tensor
) -> None:
    wide = tensor if tensor.is_floating_point() else tensor.to(out.dtype)
    write(out, _wide(wide).sum(_all_dims(dims, tensor), keepdim))


@operator("aclnnAny", "TAbT")
def _any(tensor: torch.Tensor, dims: list[int], keepdim: bool, out: torch.Tensor) -> None:
    write(out, torch.any(tensor.bool(), tuple(_all_dims(dims, tensor)), keepdim))


@operator("aclnnAll", "TAbT")
def _all(tensor: torch.Tensor, dims: list[int], keepdim: bool, out: torch.Tensor) -> None:
    write(out, torch.all(tensor.bool(), tuple(_all_dims(dims, tensor)), keepdim))


@operator("aclnnAmax", "TAbT")
def _amax(tensor: torch.Tensor, dims: list[int], keepdim: bool, out: torch.Tensor) -> None:
    write(out, tensor.amax(_all_dims(dims, tensor), keepdim))


@operator("aclnnAmin", "TAbT")
def _amin(tensor: torch.Tensor, dims: list[int], keepdim: bool, out: torch.Tensor) -> None:
    write(out, tensor.amin(_all_dims(dims, tensor), keepdim))


def _register_extremes() -> None:
    def extreme(function: Callable[..., Any]) -> Callable[..., None]:
        return lambda tensor, out: write(out, function(tensor))

    def extreme_of_dim(function: Callable[..., Any]) -> Callable[..., None]:
        def compute(tensor: Any, dim: int, keepdim: bool, values: Any, indices: Any) -> None:
            found = function(tensor, dim, keepdim)
            write(values, found.values)
            write(indices, found.indices)

        return compute

    def position(function: Callable[..., Any]) -> Callable[..., None]:
        return lambda tensor, dim, keepdim, out: write(out, function(tensor, dim, keepdim))

    for name, function in (("Max", torch.max), ("Min", torch.min)):
        operator(f"aclnn{name}", "TT")(extreme(function))
        operator(f"aclnn{name}Dim", "TibTT")(extreme_of_dim(function))
    operator("aclnnMedianDim", "TibTT")(extreme_of_dim(torch.median))
    operator("aclnnMedian", "TT")(extreme(torch.median))
    operator("aclnnArgMax", "TibT")(position(torch.argmax))
    operator("aclnnArgMin", "TibT")(position(torch.argmin))


_register_extremes()


@operator("aclnnCumsum", "TieT")
def _cumsum(tensor: torch.Tensor, dim: int, _dtype: int, out: torch.Tensor) -> None:
    wide = tensor if tensor.is_floating_point() else tensor.to(out.dtype)
    write(out, _wide(wide).cumsum(dim))


@operator("aclnnCumprod", "TSeT")
def _cumprod(tensor: torch.Tensor, dim: int, _dtype: int, out: torch.Tensor) -> None:
    write(out, _wide(tensor).cumprod(dim))


@operator("aclnnCummax", "TiTT")
def _cummax(tensor: torch.Tensor, dim: int, values: torch.Tensor, indices: torch.Tensor) -> None:
    found = torch.cummax(tensor, dim)
    write(values, found.values)
    write(indices, found.indices)


@operator("aclnnProd", "TeT")
def _prod(tensor: torch.Tensor, _dtype: int, out: torch.Tensor) -> None:
    write(out, _wide(tensor).prod())


@operator("aclnnProdDim", "TibeT")
def _prod_dim(tensor: torch.Tensor, dim: int, keepdim: bool, _dtype: int, out: Any) -> None:
    write(out, _wide(tensor).prod(dim, keepdim))


@operator("aclnnLogSumExp", "TAbT")
def _logsumexp(tensor: torch.Tensor, dims: list[int], keepdim: bool, out: torch.Tensor) -> None:
    write(out, _wide(tensor).logsumexp(dims, keepdim))


@operator("aclnnStd", "TAibT")
def _std(
    tensor: torch.Tensor, dims: list[int], correction: int, keepdim: bool, out: torch.Tensor
) -> None:
    write(out, _wide(tensor).std(_all_dims(dims, tensor), correction=correction, keepdim=keepdim))


@operator("aclnnVarMean", "TAibTT")
def _var_mean(
    tensor: torch.Tensor,
    dims: list[int],
    correction: int,
    keepdim: bool,
    variance: torch.Tensor,
    mean: torch.Tensor,
) -> None:
    wide, dims = _wide(tensor), _all_dims(dims, tensor)
    write(variance, wide.var(dims, correction=correction, keepdim=keepdim))
    write(mean, wide.mean(dims, keepdim))


@operator("aclnnSort", "TbibTT")
def _sort(
    tensor: torch.Tensor,
    stable: bool,
    dim: int,
    descending: bool,
    values: torch.Tensor,
    indices: torch.Tensor,
) -> None:
    found = torch.sort(tensor, dim=dim, descending=descending, stable=stable)
    write(values, found.values)
    write(indices, found.indices)


@operator("aclnnTopkV2", "TiibbiTT")
def _topk(
    tensor: torch.Tensor,
    k: int,
    dim: int,
    largest: bool,
    ordered: bool,
    _reserved: int,
    values: torch.Tensor,
    indices: torch.Tensor,
) -> None:
    found = torch.topk(tensor, k, dim, largest, ordered)
    write(values, found.values)
    write(indices, found.indices)


@operator("aclnnKthvalue", "TiibTT")
def _kthvalue(
    tensor: torch.Tensor,
    k: int,
    dim: int,
    keepdim: bool,
    values: torch.Tensor,
    indices: torch.Tensor,
) -> None:
    found = torch.kthvalue(tensor, k, dim, keepdim)
    write(values, found.values)
    write(indices, found.indices)


@operator("aclnnSoftmax", "TiT")
def _softmax(tensor: torch.Tensor, dim: int, out: torch.Tensor) -> None:
    write(out, torch.softmax(_wide(tensor), dim))


@operator("aclnnLogSoftmax", "TiT")
def _log_softmax(tensor: torch.Tensor, dim: int, out: torch.Tensor) -> None:
    write(out, torch.log_softmax(_wide(tensor), dim))


@operator("aclnnBincount", "TTiT")
def _bincount(
    tensor: torch.Tensor, weights: torch.Tensor | None, minlength: int, out: torch.Tensor
) -> None:
    write(out, torch.bincount(tensor, weights, minlength))


@operator("aclnnUnique2", "TbbbRTR")
def _unique(
    tensor: torch.Tensor,
    ordered: bool,
    inverse: bool,
    counts: bool,
    values: ResizedTensor,
    inverse_out: torch.Tensor,
    counts_out: ResizedTensor,
) -> None:
    found = torch.unique(tensor, ordered, True, True)
    values.write(found[0])
    if inverse or counts:
        write(inverse_out, found[1])
    if counts:
        counts_out.write(found[2])
