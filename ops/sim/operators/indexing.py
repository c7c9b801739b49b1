"""Gathers, scatters, concatenation and sequences: operators that move elements by position."""

from __future__ import annotations

import math
from typing import Any

import torch

from ..arguments import ResizedTensor
from ..table import operator, write

#: Index types; anything else among indices stands for "all of this dimension".
_INDEX_DTYPES = (torch.int64, torch.int32, torch.bool, torch.uint8)

#: Reductions of aclnnScatter.
_REPLACE, _ADD, _MULTIPLY = 0, 1, 2

Indices = list[torch.Tensor | None]


def _bytes_of(*tensors: torch.Tensor) -> int:
    return sum(each.nbytes for each in tensors)


def _index_key(tensor: torch.Tensor, indices: Indices) -> tuple[Any, ...]:
    """Return ``indices`` as a key; torch_npu passes empty tensors of shape (0,) for slices."""
    key: list[Any] = []
    for each in indices:
        if each is None or (each.shape == (0,) and _is_placeholder(each, tensor)):
            key.append(slice(None))
        else:
            key.append(each.long() if each.dtype != torch.bool else each)
    return tuple(key)


def _is_placeholder(empty: torch.Tensor, tensor: torch.Tensor) -> bool:
    """Say whether an empty index has the indexed tensor's type, as ``empty_like`` gives it."""
    return empty.dtype == tensor.dtype or empty.dtype not in _INDEX_DTYPES


@operator("aclnnIndex", "TLT", traffic=lambda _t, _i, out: 2 * _bytes_of(out))
def _index(tensor: torch.Tensor, indices: Indices, out: torch.Tensor) -> None:
    if out.numel():
        write(out, tensor[_index_key(tensor, indices)])


@operator("aclnnIndexPutImpl", "TLTbb", traffic=lambda _t, _i, values, *_: 2 * _bytes_of(values))
def _index_put(
    tensor: torch.Tensor, indices: Indices, values: torch.Tensor, accumulate: bool, _unsafe: bool
) -> None:
    key = _index_key(tensor, indices)
    if accumulate:
        # Not index_put_(None, …): advanced indices with slices between them need the same rules.
        grid = torch.arange(tensor.numel()).view(tensor.shape)[key]  # [...]: flat positions
        spread = values.to(tensor.dtype).expand(grid.shape).reshape(-1)
        flat = tensor.reshape(-1)  # a copy if the tensor is not contiguous
        tensor.copy_(flat.index_add(0, grid.reshape(-1), spread).view(tensor.shape))
    else:
        tensor[key] = values.to(tensor.dtype)


@operator("aclnnIndexSelect", "TiTT", traffic=lambda _t, _d, _i, out: 2 * _bytes_of(out))
def _index_select(tensor: torch.Tensor, dim: int, index: torch.Tensor, out: torch.Tensor) -> None:
    write(out, tensor.index_select(dim, index.reshape(-1).long()).view(out.shape))


@operator("aclnnEmbedding", "TTT", traffic=lambda _w, index, out: 2 * _bytes_of(out) + index.nbytes)
def _embedding(weight: torch.Tensor, index: torch.Tensor, out: torch.Tensor) -> None:
    write(out, torch.nn.functional.embedding(index.long(), weight))


@operator(
    "aclnnGather", "TiTT", traffic=lambda _t, _d, index, out: 2 * _bytes_of(out) + index.nbytes
)
def _gather(tensor: torch.Tensor, dim: int, index: torch.Tensor, out: torch.Tensor) -> None:
    write(out, tensor.gather(dim, index.long()))


@operator("aclnnInplaceScatter", "TiTTi")
def _scatter_in_place(
    tensor: torch.Tensor, dim: int, index: torch.Tensor, source: torch.Tensor, reduction: int
) -> None:
    index, source = index.long(), source.to(tensor.dtype)
    if reduction == _REPLACE:
        tensor.scatter_(dim, index, source)
    elif reduction == _ADD:
        tensor.scatter_add_(dim, index, source)
    else:
        tensor.scatter_(dim, index, source, reduce="multiply")


@operator("aclnnScatter", "TiTTiT")
def _scatter(
    tensor: torch.Tensor,
    dim: int,
    index: torch.Tensor,
    source: torch.Tensor,
    reduction: int,
    out: torch.Tensor,
) -> None:
    write(out, tensor)
    _scatter_in_place(out, dim, index, source, reduction)


@operator("aclnnInplaceScatterValue", "TiTSi")
def _scatter_value_in_place(
    tensor: torch.Tensor, dim: int, index: torch.Tensor, value: float, reduction: int
) -> None:
    source = torch.full(index.shape, value, dtype=tensor.dtype)
    _scatter_in_place(tensor, dim, index, source, reduction)


@operator("aclnnScatterValue", "TiTSiT")
def _scatter_value(
    tensor: torch.Tensor,
    dim: int,
    index: torch.Tensor,
    value: float,
    reduction: int,
    out: torch.Tensor,
) -> None:
    write(out, tensor)
    _scatter_value_in_place(out, dim, index, value, reduction)


@operator("aclnnScatterAdd", "TiTTT")
def _scatter_add(
    tensor: torch.Tensor, dim: int, index: torch.Tensor, source: torch.Tensor, out: torch.Tensor
) -> None:
    write(out, tensor.scatter_add(dim, index.long(), source))


@operator("aclnnInplaceIndexCopy", "TiTT")
def _index_copy_in_place(
    tensor: torch.Tensor, dim: int, index: torch.Tensor, source: torch.Tensor
) -> None:
    tensor.index_copy_(dim, index.long(), source)


@operator("aclnnIndexCopy", "TiTTT")
def _index_copy(
    tensor: torch.Tensor, dim: int, index: torch.Tensor, source: torch.Tensor, out: torch.Tensor
) -> None:
    write(out, tensor.index_copy(dim, index.long(), source))


@operator("aclnnIndexAdd", "TiTTST")
def _index_add(
    tensor: torch.Tensor,
    dim: int,
    index: torch.Tensor,
    source: torch.Tensor,
    alpha: float,
    out: torch.Tensor,
) -> None:
    write(out, tensor.index_add(dim, index.long(), source, alpha=alpha))


@operator("aclnnInplaceIndexFill", "TiTS")
def _index_fill(tensor: torch.Tensor, dim: int, index: torch.Tensor, value: float) -> None:
    tensor.index_fill_(dim, index.long(), value)


@operator("aclnnTake", "TTT")
def _take(tensor: torch.Tensor, index: torch.Tensor, out: torch.Tensor) -> None:
    write(out, tensor.take(index.long()))


@operator("aclnnCat", "LiT")
def _cat(tensors: list[torch.Tensor], dim: int, out: torch.Tensor) -> None:
    write(out, torch.cat(tensors, dim))


@operator("aclnnStack", "LiT")
def _stack(tensors: list[torch.Tensor], dim: int, out: torch.Tensor) -> None:
    write(out, torch.stack(tensors, dim))


@operator("aclnnRepeat", "TAT")
def _repeat(tensor: torch.Tensor, repeats: list[int], out: torch.Tensor) -> None:
    write(out, tensor.repeat(repeats))


@operator("aclnnRepeatInterleave", "TTiT")
def _repeat_interleave(
    tensor: torch.Tensor, repeats: torch.Tensor, _size: int, out: torch.Tensor
) -> None:
    write(out, torch.repeat_interleave(tensor, repeats))


@operator("aclnnRepeatInterleaveWithDim", "TTiiT")
def _repeat_interleave_dim(
    tensor: torch.Tensor, repeats: torch.Tensor, dim: int, _size: int, out: torch.Tensor
) -> None:
    write(out, torch.repeat_interleave(tensor, repeats, dim))


@operator("aclnnRepeatInterleaveInt", "TiiT")
def _repeat_interleave_int(
    tensor: torch.Tensor, repeats: int, _size: int, out: torch.Tensor
) -> None:
    write(out, torch.repeat_interleave(tensor, repeats))


@operator("aclnnRepeatInterleaveIntWithDim", "TiiiT")
def _repeat_interleave_int_dim(
    tensor: torch.Tensor, repeats: int, dim: int, _size: int, out: torch.Tensor
) -> None:
    write(out, torch.repeat_interleave(tensor, repeats, dim))


@operator("aclnnRepeatInterleaveTensor", "TiT")
def _repeat_positions(repeats: torch.Tensor, _size: int, out: torch.Tensor) -> None:
    write(out, torch.repeat_interleave(repeats))


@operator("aclnnFlip", "TAT")
def _flip(tensor: torch.Tensor, dims: list[int], out: torch.Tensor) -> None:
    write(out, tensor.flip(dims))


@operator("aclnnRoll", "TAAT")
def _roll(tensor: torch.Tensor, shifts: list[int], dims: list[int], out: torch.Tensor) -> None:
    write(out, tensor.roll(shifts, dims))


@operator("aclnnConstantPadNd", "TAST")
def _pad(tensor: torch.Tensor, padding: list[int], value: float, out: torch.Tensor) -> None:
    write(out, torch.nn.functional.pad(tensor, padding, value=value))


@operator("aclnnArange", "SSST")
def _arange(start: float, end: float, step: float, out: torch.Tensor) -> None:
    write(out, torch.arange(start, end, step, dtype=out.dtype))


@operator("aclnnRange", "SSST")
def _range(start: float, end: float, step: float, out: torch.Tensor) -> None:
    count = math.floor((end - start) / step) + 1
    write(out, (torch.arange(count, dtype=torch.float64) * step + start).to(out.dtype))


@operator("aclnnLinspace", "SSiT")
def _linspace(start: float, end: float, steps: int, out: torch.Tensor) -> None:
    write(out, torch.linspace(start, end, steps, dtype=out.dtype))


@operator("aclnnEye", "iiT")
def _eye(rows: int, columns: int, out: torch.Tensor) -> None:
    write(out, torch.eye(rows, columns, dtype=out.dtype))


@operator("aclnnNonzero", "TR")
def _nonzero(tensor: torch.Tensor, out: ResizedTensor) -> None:
    out.write(tensor.nonzero())


@operator("aclnnNonzeroV2", "TR")
def _nonzero_columns(tensor: torch.Tensor, out: ResizedTensor) -> None:
    out.write(tensor.nonzero().t())  # [dims, found]


@operator("aclnnMaskedSelect", "TTR")
def _masked_select(tensor: torch.Tensor, mask: torch.Tensor, out: ResizedTensor) -> None:
    out.write(tensor.masked_select(mask.bool()))


@operator("aclnnInplaceMaskedScatter", "TTT")
def _masked_scatter(tensor: torch.Tensor, mask: torch.Tensor, source: torch.Tensor) -> None:
    tensor.masked_scatter_(mask.bool(), source)


@operator("aclnnSearchSorted", "TTbbTT")
def _search_sorted(
    sequence: torch.Tensor,
    values: torch.Tensor,
    _int32: bool,
    right: bool,
    sorter: torch.Tensor | None,
    out: torch.Tensor,
) -> None:
    write(out, torch.searchsorted(sequence, values, right=right, sorter=sorter))


@operator("aclnnOneHot", "TiTTiT")
def _one_hot(
    index: torch.Tensor,
    depth: int,
    on_value: torch.Tensor,
    off_value: torch.Tensor,
    axis: int,
    out: torch.Tensor,
) -> None:
    hot = index.long()[..., None] == torch.arange(depth)  # [..., depth]
    result = torch.where(hot, on_value.reshape(()), off_value.reshape(()))
    write(out, result if axis == -1 else result.movedim(-1, axis))
