"""Rotations by Hadamard matrices, as matrix products on the cube unit."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Hashable

import torch

from .. import checks, npu_weights, quantise
from ..dispatch import Implementation, Operator
from ..hadamard import HadamardRequest, check
from ..npu_weights import MAX_HADAMARD


@functools.cache
def _matrix(head_dim: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Return the symmetric ``[head_dim, head_dim]`` of :func:`ops.quantise.rotate`; it is exact."""
    return quantise.rotate(torch.eye(head_dim)).to(dtype).to(device)


def rotate(rows: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
    """Return ``[..., head_dim]`` turned by a Walsh-Hadamard transform, not normalised.

    The products are summed in float32 and rounded once to the type of ``rows``.

    Args:
        rows: any leading dimensions.
        out: where to write; contiguous.
    """
    matrix = _matrix(rows.shape[-1], rows.dtype, rows.device)
    if out is None:
        return rows @ matrix
    flat = rows.reshape(-1, rows.shape[-1])
    torch.mm(flat, matrix, out=out.view(flat.shape))
    return out


def hadamard(x: torch.Tensor, base: torch.Tensor | None, block: int, scale: float) -> torch.Tensor:
    """Rotate blocks of columns; arguments and errors as in :mod:`ops.hadamard`."""
    order = 1 if base is None else base.shape[0]
    signature: Hashable = (
        x.dtype,
        x.shape[1:],
        x.stride()[1:],
        base is None or checks.kind(base),
        block,
    )
    kernel = operator.kernel(signature)
    if kernel is None:
        check(x, base, block)
        request = HadamardRequest(x.dtype, x.shape[1], block, order)
        kernel = operator.load(signature, request)
    if not x.shape[0]:
        return x.new_empty(x.shape)
    out: torch.Tensor = kernel(x, base, block, scale)
    return out


def _products(x: torch.Tensor, base: torch.Tensor | None, block: int, scale: float) -> torch.Tensor:
    """Multiply blocks, seen as ``[block / inner, inner]``, by a matrix from each side."""
    inner = _inner(1 if base is None else base.shape[0], block)
    left = _left(base, block // inner, x.dtype, x.device)
    if inner == 1:
        out = x.reshape(-1, block) @ left.t()
    else:
        # Sylvester's matrix is the Kronecker product of two smaller ones.
        out = left @ rotate(x.reshape(-1, block // inner, inner))
    out = out.view(x.shape)
    return out if scale == 1.0 else out.mul_(scale)


def _inner(order: int, block: int) -> int:
    """Return the columns that the second matrix mixes; 1: the first one mixes all."""
    if block <= MAX_HADAMARD:
        return 1
    return min(block // order, 1 << math.ceil(math.log2(block) / 2))


@functools.lru_cache(maxsize=256)
def _left(
    base: torch.Tensor | None, size: int, dtype: torch.dtype, device: torch.device
) -> torch.Tensor:
    """Return ``base (x) S`` ``[size, size]``; by identity of ``base``, which does not change."""
    order = 1 if base is None else base.shape[0]
    matrix = quantise.rotate(torch.eye(size // order))
    if base is not None:
        matrix = torch.kron(base.cpu(), matrix)
    return matrix.to(dtype).contiguous().to(device)


def _load() -> Callable[..., torch.Tensor]:
    return _products


operator: Operator[HadamardRequest] = Operator(
    "hadamard (npu)", (Implementation("npu", npu_weights.hadamard, load=_load),)
)
