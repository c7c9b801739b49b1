"""Attention of a ragged batch of queries over pages of latents (multi-head latent attention, MLA).

The up-projections of K and V are absorbed: ``query`` is ``q_nope @ W_UK`` and ``W_UV`` is applied
to ``out`` (DeepSeek-V2, arXiv:2405.04434, section 2.1.2). What remains is attention in which all
query heads share one key, the latent ``c[t]`` with the rotary part ``r[t]``, and one value, the
latent. Sequence ``i`` owns query rows ``query_start_loc[i] .. query_start_loc[i + 1]``: the last
``n`` of its ``seq_lens[i]`` tokens, 1 in decode, 2 to 16 in verification of drafted tokens, more in
(chunked) prefill. Row ``j`` stands at position ``p = seq_lens[i] - n + j`` and sees the tokens
``t < seq_lens[i]`` with ``t <= p`` if ``causal``::

    s = scale * (query . c[t] + query_rotary . r[t])
    out = sum_t softmax(s)[t] c[t]

Rows outside the batch are not written; rows that see no token become zero. Sums are float32.
Int8 pages mean what :func:`ops.latent.latent_values` returns.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import torch

from .. import batch_checks, checks, latent
from ..dispatch import Bound, Implementation, Operator
from ..library import needs_dispatcher, register
from ..page_layout import LatentLayout, Quantisation
from . import native, reference

SCHEMA = (
    "mla_attention(Tensor query, Tensor query_rotary, Tensor pages, Tensor(a!) out, "
    "Tensor query_start_loc, Tensor seq_lens, Tensor block_table, int[] layout, float scale, "
    "bool causal=True, Tensor? channel_scales=None, bool fast=False) -> ()"
)


@dataclass(frozen=True, slots=True)
class LatentAttentionRequest:
    """What an implementation must know of a call to say whether it can serve it."""

    dtype: torch.dtype
    page_dtype: torch.dtype
    num_heads: int
    latent_dim: int
    rotary_dim: int
    block_size: int
    quantisation: Quantisation = Quantisation.NONE


operator: Operator[LatentAttentionRequest] = Operator(
    "mla_attention",
    (
        Implementation("native", native.supports, native.bind),
        Implementation("reference", reference.supports, reference.bind),
    ),
)


def mla_attention(
    query: torch.Tensor,
    query_rotary: torch.Tensor,
    pages: torch.Tensor,
    out: torch.Tensor,
    query_start_loc: torch.Tensor,
    seq_lens: torch.Tensor,
    block_table: torch.Tensor,
    layout: Sequence[int],
    *,
    scale: float,
    causal: bool = True,
    channel_scales: torch.Tensor | None = None,
    fast: bool = False,
) -> None:
    """Attend a ragged batch of queries to paged latents, into ``out``.

    What is computed is in this module's documentation.

    Args:
        query: ``[tokens, heads, latent_dim]``, float32, float16 or bfloat16, last dimension
            contiguous.
        query_rotary: ``[tokens, heads, rotary_dim]`` of the same type.
        pages: ``[blocks, block_size, content]``, contiguous within a block.
        out: the shape and dtype of ``query``, written in place.
        query_start_loc: int32 ``[sequences + 1]``, rising from 0 to at most ``tokens``.
        seq_lens: int32 ``[sequences]``, tokens of context including the new ones.
        block_table: int32 ``[sequences, max_blocks]``; only blocks that some row sees are read.
        layout: a :class:`LatentLayout`, from ``LatentPageFormat.layout()``.
        scale: factor of the scores.
        causal: whether a token sees only itself and earlier ones.
        channel_scales: C8S pages: float32 ``[latent_dim]``, contiguous; None otherwise.
        fast: int8 pages only: kernels may round queries and weights to 8 bits before they multiply
            them with codes, instead of 16.

    Raises:
        ValueError: a shape, dtype, stride or block id is not as above.
    """
    call = torch.ops.ascend_plugin.mla_attention if needs_dispatcher(pages) else _cpu
    batch = (query_start_loc, seq_lens, block_table)
    call(query, query_rotary, pages, out, *batch, layout, scale, causal, channel_scales, fast)


def _cpu(
    query: torch.Tensor,
    query_rotary: torch.Tensor,
    pages: torch.Tensor,
    out: torch.Tensor,
    query_start_loc: torch.Tensor,
    seq_lens: torch.Tensor,
    block_table: torch.Tensor,
    layout: Sequence[int],
    scale: float,
    causal: bool = True,
    channel_scales: torch.Tensor | None = None,
    fast: bool = False,
) -> None:
    signature = _signature(query, query_rotary, pages, out, layout, channel_scales, fast)
    bound = operator.bound(signature)
    if bound is None:
        bound = _bind(signature, query, query_rotary, pages, out, layout, channel_scales, fast)
    batch_checks.check_batch(query_start_loc, seq_lens, block_table)
    size = bound.layout.block_size
    batch_checks.check_fit(query, out, query_start_loc, seq_lens, block_table, size)
    check_counts(query, query_rotary)
    if seq_lens.shape[0] == 0:
        return
    bound.run(
        query,
        query_rotary,
        pages,
        out,
        query_start_loc,
        seq_lens,
        block_table,
        scale=scale,
        causal=causal,
        channel_scales=channel_scales,
        fast=fast,
    )


def _signature(
    query: torch.Tensor,
    query_rotary: torch.Tensor,
    pages: torch.Tensor,
    out: torch.Tensor,
    layout: Sequence[int],
    channel_scales: torch.Tensor | None,
    fast: bool,
) -> Hashable:
    """Return what checks and the choice depend on. It is flat: nested tuples hash slower."""
    return (
        layout if type(layout) is LatentLayout else tuple(layout),
        pages.dtype,
        pages.shape,
        pages.stride(),
        query.dtype,
        query.shape[1:],
        query.stride()[2:],
        query_rotary.dtype,
        query_rotary.shape[1:],
        query_rotary.stride()[2:],
        out.dtype,
        out.shape[1:],
        out.stride()[2:],
        channel_scales is None or checks.kind(channel_scales),
        fast,
    )


def _bind(
    signature: Hashable,
    query: torch.Tensor,
    query_rotary: torch.Tensor,
    pages: torch.Tensor,
    out: torch.Tensor,
    layout: Sequence[int],
    channel_scales: torch.Tensor | None,
    fast: bool,
) -> Bound:
    page = latent.latent_layout(layout)
    latent.check_pages(pages, page)
    width, rotary = page.latent_dim, page.rotary_dim
    check_rows(query, query_rotary, out, width, rotary)
    latent.check_channel_scales(channel_scales, page)
    quantisation = Quantisation(page.quantisation)
    checks.check_fast(fast, quantisation)
    request = LatentAttentionRequest(
        query.dtype, pages.dtype, query.shape[1], width, rotary, page.block_size, quantisation
    )
    return operator.bind(signature, request, pages, page)


def check_rows(
    query: torch.Tensor,
    query_rotary: torch.Tensor,
    out: torch.Tensor,
    latent_dim: int,
    rotary_dim: int,
) -> None:
    """Refuse queries and an output that do not match the pages, or each other but in tokens.

    Raises:
        ValueError: a width, a number of heads, a type or an order in memory differs.
    """
    words = f"[tokens, heads, {latent_dim}] (latent dimension)"
    latent.check_rows("query", query, [-1, latent_dim], words)
    latent.check_rows("out", out, [-1, latent_dim], words)
    words = f"[tokens, heads, {rotary_dim}] (rotary dimension)"
    latent.check_rows("query_rotary", query_rotary, [-1, rotary_dim], words)
    if out.shape[1:] != query.shape[1:] or out.dtype != query.dtype:
        raise batch_checks.out_differs(query, out)
    if query_rotary.shape[1] != query.shape[1] or query_rotary.dtype != query.dtype:
        raise _rotary_differs(query, query_rotary)


def check_counts(query: torch.Tensor, query_rotary: torch.Tensor) -> None:
    """Refuse another number of rotary parts than of queries.

    Raises:
        ValueError: they differ.
    """
    if query_rotary.shape[0] != query.shape[0]:
        raise _rotary_differs(query, query_rotary)


def _rotary_differs(query: torch.Tensor, query_rotary: torch.Tensor) -> ValueError:
    return ValueError(
        f"query_rotary ({list(query_rotary.shape)}, {query_rotary.dtype}) must have the tokens, "
        f"heads and dtype of query ({list(query.shape)}, {query.dtype})."
    )


def _fake(
    query: torch.Tensor,
    query_rotary: torch.Tensor,
    pages: torch.Tensor,
    out: torch.Tensor,
    query_start_loc: torch.Tensor,
    seq_lens: torch.Tensor,
    block_table: torch.Tensor,
    layout: list[int],
    scale: float,
    causal: bool = True,
    channel_scales: torch.Tensor | None = None,
    fast: bool = False,
) -> None:
    return None


register(SCHEMA, cpu=_cpu, fake=_fake)
