"""Copy K and V of whole sequences out of NZ pages, dequantised."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import torch

from .. import checks
from ..dispatch import Bound, Implementation, Operator
from ..library import needs_dispatcher, register
from ..page_layout import PageLayout, Quantisation
from . import reference

SCHEMA = (
    "kv_cache_gather(Tensor pages, Tensor block_table, Tensor seq_lens, Tensor starts, "
    "Tensor(a!) key, Tensor(b!) value, int[] layout, Tensor? channel_scales=None) -> ()"
)


@dataclass(frozen=True, slots=True)
class GatherRequest:
    """What an implementation must know of a call to say whether it can serve it."""

    dtype: torch.dtype
    page_dtype: torch.dtype
    num_kv_heads: int
    head_dim: int
    block_size: int
    quantisation: Quantisation = Quantisation.NONE


operator: Operator[GatherRequest] = Operator(
    "kv_cache_gather",
    (Implementation("reference", reference.supports, reference.bind),),
)


def kv_cache_gather(
    pages: torch.Tensor,
    block_table: torch.Tensor,
    seq_lens: torch.Tensor,
    starts: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    layout: Sequence[int],
    *,
    channel_scales: torch.Tensor | None = None,
) -> None:
    """Copy K and V of sequences out of NZ pages into contiguous rows, in place.

    Row ``starts[i] + n`` of ``key`` becomes K of token ``n`` of sequence ``i``, for ``n`` below
    ``seq_lens[i]``; likewise ``value``. It is for paths that need plain keys and values, such as
    dense prefill over a cached prefix.

    Int8 pages are dequantised in float32 (``dequantise_pages`` in ``ops/quantise.py``): codes times
    scales; C8D's keys are rotated back; C8P's patches are added, those of tokens that the sequence
    owns. The result is rounded once, to nearest even. A C8D row that was written with a NaN or an
    infinity is NaN.

    Example: two sequences of 3 and 5 tokens, one after the other::

        kv_cache_gather(pages, block_table, tensor([3, 5]), tensor([0, 3]), key, value, layout)

    Args:
        pages: ``[blocks, kv_heads, block_size, content]``; the last two dimensions contiguous.
        block_table: int32 ``[sequences, max_blocks]``, the pages of each sequence, in order; last
            dimension contiguous. Entries beyond a sequence's blocks may be anything.
        seq_lens: int32 ``[sequences]``, tokens to copy, 0 to ``max_blocks * block_size``.
        starts: int32 ``[sequences]``, the row at which each sequence begins. Where sequences
            overlap, the result is one of them.
        key: ``[rows, kv_heads, head_dim]``, float32, float16 or bfloat16, contiguous, written in
            place; rows that no sequence owns keep what they hold.
        value: the same shape and dtype as ``key``.
        layout: a :class:`PageLayout`, from ``PageFormat.layout()``.
        channel_scales: C8S and C8P: float32 ``[2, kv_heads, head_dim]``, contiguous, K first; None
            otherwise.

    Raises:
        ValueError: a shape, dtype, stride, length, row or block id is not as above.
    """
    call = torch.ops.ascend_plugin.kv_cache_gather if needs_dispatcher(pages) else _cpu
    call(pages, block_table, seq_lens, starts, key, value, layout, channel_scales)


def _cpu(
    pages: torch.Tensor,
    block_table: torch.Tensor,
    seq_lens: torch.Tensor,
    starts: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    layout: Sequence[int],
    channel_scales: torch.Tensor | None = None,
) -> None:
    signature = _signature(pages, key, value, layout, channel_scales)
    bound = operator.bound(signature)
    if bound is None:
        bound = _bind(signature, pages, key, value, layout, channel_scales)
    if key.shape != value.shape:
        raise _differ(key, value)
    check_sequences(block_table, seq_lens, starts)
    _check_fit(block_table, seq_lens, starts, key.shape[0], bound.layout.block_size)
    bound.run(pages, block_table, seq_lens, starts, key, value, channel_scales=channel_scales)


def _signature(
    pages: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    layout: Sequence[int],
    channel_scales: torch.Tensor | None,
) -> Hashable:
    """Return what checks and the choice depend on. It is flat: nested tuples hash slower."""
    return (
        layout if type(layout) is PageLayout else tuple(layout),
        pages.dtype,
        pages.shape,
        pages.stride(),
        key.dtype,
        key.shape[1:],
        key.is_contiguous(),
        value.dtype,
        value.shape[1:],
        value.is_contiguous(),
        channel_scales is None or checks.kind(channel_scales),
    )


def _bind(
    signature: Hashable,
    pages: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    layout: Sequence[int],
    channel_scales: torch.Tensor | None,
) -> Bound:
    page_layout = checks.page_layout(layout)
    checks.check_pages(pages, page_layout)
    check_rows(key, value, pages.shape[1], page_layout.head_dim)
    quantisation = Quantisation(page_layout.quantisation)
    checks.check_channel_scales(channel_scales, quantisation, pages.shape[1], page_layout.head_dim)
    request = GatherRequest(
        key.dtype,
        pages.dtype,
        pages.shape[1],
        page_layout.head_dim,
        page_layout.block_size,
        quantisation,
    )
    return operator.bind(signature, request, pages, page_layout)


def check_rows(key: torch.Tensor, value: torch.Tensor, kv_heads: int, head_dim: int) -> None:
    """Refuse outputs that do not fit the pages.

    Raises:
        ValueError: shape, dtype or order in memory of ``key`` or ``value`` differ.
    """
    for name, rows in (("key", key), ("value", value)):
        checks.check_tokens(name, rows, head_dim)
        if rows.shape[1] != kv_heads:
            raise ValueError(f"{name} has {rows.shape[1]} kv heads, pages have {kv_heads}.")
        if not rows.is_contiguous():
            raise ValueError(
                f"{name} must be contiguous, got strides {rows.stride()}; allocate it with "
                "torch.empty."
            )
    if key.shape != value.shape or key.dtype != value.dtype:
        raise _differ(key, value)


def check_sequences(
    block_table: torch.Tensor, seq_lens: torch.Tensor, starts: torch.Tensor
) -> None:
    """Refuse descriptions of sequences that do not go together.

    Raises:
        ValueError: a dtype, rank, stride or number of sequences differs.
    """
    checks.check_integer("block_table", block_table, torch.int32, 2)
    checks.check_integer("seq_lens", seq_lens, torch.int32, 1)
    checks.check_integer("starts", starts, torch.int32, 1)
    sequences = seq_lens.shape[0]
    if starts.shape[0] != sequences or block_table.shape[0] != sequences:
        raise ValueError(
            f"{sequences} seq_lens need as many starts and rows of block_table, got "
            f"{starts.shape[0]} and {block_table.shape[0]}."
        )


def _check_fit(
    block_table: torch.Tensor,
    seq_lens: torch.Tensor,
    starts: torch.Tensor,
    rows: int,
    block_size: int,
) -> None:
    """Refuse sequences beyond their blocks, or beyond the rows to write."""
    longest = block_table.shape[1] * block_size
    for length, start in zip(seq_lens.tolist(), starts.tolist(), strict=True):
        if not 0 <= length <= longest:
            raise ValueError(
                f"seq_lens must lie within 0..{longest}, what {block_table.shape[1]} columns of "
                f"block_table hold in blocks of {block_size}, got {length}."
            )
        if not 0 <= start <= rows - length:
            raise ValueError(
                f"a sequence of {length} tokens does not fit at row {start} of key and value, "
                f"which have {rows}; make starts the running sum of seq_lens."
            )


def _differ(key: torch.Tensor, value: torch.Tensor) -> ValueError:
    return ValueError(
        f"key ({list(key.shape)}, {key.dtype}) and value ({list(value.shape)}, {value.dtype}) "
        "must have the same shape and dtype."
    )


def _fake(
    pages: torch.Tensor,
    block_table: torch.Tensor,
    seq_lens: torch.Tensor,
    starts: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    layout: list[int],
    channel_scales: torch.Tensor | None = None,
) -> None:
    return None


register(SCHEMA, cpu=_cpu, fake=_fake)
