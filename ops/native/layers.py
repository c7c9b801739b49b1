"""Typed calls into the native kernels of small layers of decoders; see ``kernels``."""

from __future__ import annotations

import torch

from .abi import (
    Elementwise,
    Status,
    pack_elementwise_args,
    pack_embedding_args,
    pack_rotary_args,
)
from .kernels import DTYPES, address, refused
from .loader import NativeLibrary


def rotary(
    lib: NativeLibrary,
    positions: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor | None,
    table: torch.Tensor,
    halves: bool,
) -> None:
    """Call ``ascend_cpu_rotary`` on torch's threads: rotary position embedding in place.

    Elements ``x`` and ``y`` of a head become ``x cos - y sin`` and ``y cos + x sin``, in float32
    and rounded once (RoFormer, arXiv:2104.09864, equation 34), as in vLLM's ``rotary_embedding``.

    Args:
        lib: loaded kernels.
        positions: int64 ``[m]``, contiguous.
        query: ``[m, query heads, head_dim]``, contiguous in its last dimension. The first
            ``rotary_dim`` elements of a head are turned, the others stay.
        key: ``[m, kv heads, head_dim]``, likewise, or None.
        table: ``[rows, rotary_dim]`` of the type of ``query``: half a row of cosines, then sines.
        halves: an element turns with that half of ``rotary_dim`` behind it (NeoX), or the next one.

    Raises:
        ValueError: a position outside the table; nothing was written.
    """
    turned = query if key is None else key
    rows, rotary_dim = table.shape
    strides = (query.stride(0), query.stride(1), turned.stride(0), turned.stride(1))
    status = lib.rotary(
        pack_rotary_args(
            positions.data_ptr(),
            query.data_ptr(),
            address(key),
            table.data_ptr(),
            *strides,
            table.stride(0),
            rows,
            *query.shape[:2],
            0 if key is None else key.shape[1],
            rotary_dim,
            halves,
            DTYPES[query.dtype],
            torch.get_num_threads(),
        )
    )
    if status == Status.BAD_SLOT:
        raise outside("position", positions, rows, "the table must cover max_model_len")
    if status != Status.OK:
        raise refused(f"rotary embedding of {rotary_dim} elements of {query.dtype}", status)


def elementwise(
    lib: NativeLibrary,
    operation: Elementwise,
    x: torch.Tensor,
    y: torch.Tensor | None,
    out: torch.Tensor,
    factor: float = 1.0,
) -> None:
    """Call ``ascend_cpu_elementwise`` on torch's threads: ``out = f(x)`` or ``f(x, y)``.

    In float32 and rounded once. ``GELU`` and ``GELU_TANH``: arXiv:1606.08415.

    Args:
        lib: loaded kernels.
        operation: the function.
        x: ``[m, k]``, rows contiguous.
        y: ``[m, k]`` of the type of ``x``, likewise; None for functions of one argument.
            ``KEEP_ROWS``: int64 ``[m]``; rows of ``x`` where it is 0 become zeros. ``SCALE``: one
            element that ``x`` is multiplied by, or None.
        out: ``[m, k]`` of the type of ``x``, likewise, written; may be ``x`` or ``y``.
        factor: of ``SCALE`` without ``y``.
    """
    m, k = x.shape
    status = lib.elementwise(
        pack_elementwise_args(
            x.data_ptr(),
            address(y),
            out.data_ptr(),
            x.stride(0),
            0 if y is None or not y.dim() else y.stride(0),
            out.stride(0),
            m,
            k,
            operation,
            factor,
            DTYPES[x.dtype],
            torch.get_num_threads(),
        )
    )
    if status != Status.OK:
        raise refused(f"function {operation} of [{m}, {k}] of {x.dtype}", status)


def embedding(
    lib: NativeLibrary, ids: torch.Tensor, table: torch.Tensor, out: torch.Tensor
) -> None:
    """Call ``ascend_cpu_embedding`` on torch's threads: ``out[i] = table[ids[i]]``.

    Args:
        lib: loaded kernels.
        ids: int32 or int64 ``[m]``, contiguous.
        table: ``[rows, k]``, rows contiguous.
        out: ``[m, k]`` of the type of ``table``, contiguous, written.

    Raises:
        ValueError: an id outside the table; nothing was written.
    """
    rows, k = table.shape
    status = lib.embedding(
        pack_embedding_args(
            ids.data_ptr(),
            table.data_ptr(),
            out.data_ptr(),
            table.stride(0) * table.itemsize,
            rows,
            ids.shape[0],
            k * table.itemsize,
            ids.itemsize,
            torch.get_num_threads(),
        )
    )
    if status == Status.BAD_SLOT:
        raise outside("id", ids, rows, "the ids must be tokens of this model")
    if status != Status.OK:
        raise refused(f"rows of {k} elements of {table.dtype} by {ids.dtype}", status)


def outside(what: str, values: torch.Tensor, rows: int, remedy: str) -> ValueError:
    """Return the error of an index that leaves a table of ``rows`` rows."""
    low, high = (int(extreme) for extreme in values.aminmax())
    return ValueError(
        f"{what} {low if low < 0 else high} lies outside the table, which has rows 0 to "
        f"{rows - 1}; {remedy}."
    )
