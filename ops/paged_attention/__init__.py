"""Attention of a ragged batch of queries over NZ pages.

Sequence ``i`` owns query rows ``query_start_loc[i] .. query_start_loc[i + 1]``: the last ``n``
of its ``seq_lens[i]`` tokens. One row is decode, 2 to 16 are verification of drafted tokens,
more are (chunked) prefill; they may be mixed. Row ``j`` stands at position
``p = seq_lens[i] - n + j`` and sees the tokens ``t < seq_lens[i]`` with ``t <= p`` if
``causal`` and ``t > p - window`` if ``window > 0`` (and ``t < p + window`` if not causal)::

    s = scale * q . k[t];  s = soft_cap * tanh(s / soft_cap);  s += alibi * (t - p)
    out = sum_t exp(s[t] - m) v[t] / (sum_t exp(s[t] - m) + exp(sink - m))

Rows outside the batch are not written; rows that see no token become zero. Sums are float32.
Int8 pages mean what :func:`ops.quantise.dequantise_pages` returns.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from functools import partial

import torch

from .. import batch_checks, checks
from ..dispatch import Bound, Implementation, Operator
from ..library import needs_dispatcher, register
from ..page_layout import PageLayout, Quantisation
from . import native, reference

SCHEMA = (
    "paged_attention(Tensor query, Tensor pages, Tensor(a!) out, Tensor query_start_loc, "
    "Tensor seq_lens, Tensor block_table, int[] layout, float scale, bool causal=True, "
    "int window=0, float soft_cap=0.0, Tensor? alibi_slopes=None, Tensor? sinks=None, "
    "Tensor? channel_scales=None, bool fast=False) -> ()"
)


@dataclass(frozen=True, slots=True)
class AttentionRequest:
    """What an implementation must know of a call to say whether it can serve it."""

    dtype: torch.dtype
    page_dtype: torch.dtype
    num_heads: int
    num_kv_heads: int
    head_dim: int
    block_size: int
    quantisation: Quantisation = Quantisation.NONE


operator: Operator[AttentionRequest] = Operator(
    "paged_attention",
    (
        Implementation("native", native.supports, native.bind),
        Implementation("reference", reference.supports, reference.bind),
    ),
)


def paged_attention(
    query: torch.Tensor,
    pages: torch.Tensor,
    out: torch.Tensor,
    query_start_loc: torch.Tensor,
    seq_lens: torch.Tensor,
    block_table: torch.Tensor,
    layout: Sequence[int],
    *,
    scale: float,
    causal: bool = True,
    window: int = 0,
    soft_cap: float = 0.0,
    alibi_slopes: torch.Tensor | None = None,
    sinks: torch.Tensor | None = None,
    channel_scales: torch.Tensor | None = None,
    fast: bool = False,
) -> None:
    """Attend a ragged batch of queries to paged keys and values, into ``out``.

    What is computed is in this module's documentation.

    Args:
        query: ``[tokens, heads, head_dim]``, float32, float16 or bfloat16, last dimension
            contiguous.
        pages: ``[blocks, kv_heads, block_size, content]``, the last two dimensions contiguous.
            Query head ``h`` reads kv head ``h * kv_heads // heads``.
        out: the shape and dtype of ``query``, written in place.
        query_start_loc: int32 ``[sequences + 1]``, rising from 0 to at most ``tokens``.
        seq_lens: int32 ``[sequences]``, tokens of context including the new ones.
        block_table: int32 ``[sequences, max_blocks]``; only blocks that some row sees are read.
        layout: a :class:`PageLayout`, from ``PageFormat.layout()``.
        scale: factor of the scores.
        causal: whether a token sees only itself and earlier ones.
        window: how many tokens a row sees, itself included; 0: all.
        soft_cap: bound of the scores (Gemma 2); 0: none.
        alibi_slopes: float32 ``[heads]`` (ALiBi, arXiv:2108.12409).
        sinks: float32 ``[heads]``, logits of a key without a value (as in gpt-oss).
        channel_scales: pages with static scales (C8S, C8P): float32 ``[2, kv_heads, head_dim]``,
            contiguous, K first; None otherwise.
        fast: int8 pages only: kernels may round queries and weights to 8 bits before they multiply
            them with codes, instead of 16.

    Raises:
        ValueError: a shape, dtype, stride or block id is not as above.
    """
    rest = (scale, causal, window, soft_cap, alibi_slopes, sinks, channel_scales, fast)
    call = torch.ops.ascend_plugin.paged_attention if needs_dispatcher(pages) else _cpu
    call(query, pages, out, query_start_loc, seq_lens, block_table, layout, *rest)


def _cpu(
    query: torch.Tensor,
    pages: torch.Tensor,
    out: torch.Tensor,
    query_start_loc: torch.Tensor,
    seq_lens: torch.Tensor,
    block_table: torch.Tensor,
    layout: Sequence[int],
    scale: float,
    causal: bool = True,
    window: int = 0,
    soft_cap: float = 0.0,
    alibi_slopes: torch.Tensor | None = None,
    sinks: torch.Tensor | None = None,
    channel_scales: torch.Tensor | None = None,
    fast: bool = False,
) -> None:
    signature = _signature(query, pages, out, layout, channel_scales, fast)
    bound = operator.bound(signature)
    if bound is None:
        bound = _bind(signature, query, pages, out, layout, channel_scales, fast)
    batch_checks.check_batch(query_start_loc, seq_lens, block_table)
    batch_checks.check_fit(
        query, out, query_start_loc, seq_lens, block_table, bound.layout.block_size
    )
    _check_scores(query.shape[1], window, soft_cap, alibi_slopes, sinks)
    if seq_lens.shape[0] == 0:
        return
    run = bound.run
    if bound.layout.quantisation:
        run = partial(run, channel_scales=channel_scales, fast=fast)
    run(
        query,
        pages,
        out,
        query_start_loc,
        seq_lens,
        block_table,
        scale=scale,
        causal=causal,
        window=window,
        soft_cap=soft_cap,
        alibi_slopes=alibi_slopes,
        sinks=sinks,
    )


def _signature(
    query: torch.Tensor,
    pages: torch.Tensor,
    out: torch.Tensor,
    layout: Sequence[int],
    channel_scales: torch.Tensor | None,
    fast: bool,
) -> Hashable:
    """Return what checks and the choice depend on. It is flat: nested tuples hash slower."""
    return (
        layout if type(layout) is PageLayout else tuple(layout),
        pages.dtype,
        pages.shape,
        pages.stride(),
        query.dtype,
        query.shape[1:],
        query.stride()[2:],
        out.dtype,
        out.shape[1:],
        out.stride()[2:],
        channel_scales is None or checks.kind(channel_scales),
        fast,
    )


def _bind(
    signature: Hashable,
    query: torch.Tensor,
    pages: torch.Tensor,
    out: torch.Tensor,
    layout: Sequence[int],
    channel_scales: torch.Tensor | None,
    fast: bool,
) -> Bound:
    page_layout = checks.page_layout(layout)
    _check_tensors(query, pages, out, page_layout)
    quantisation = Quantisation(page_layout.quantisation)
    checks.check_channel_scales(channel_scales, quantisation, pages.shape[1], page_layout.head_dim)
    checks.check_fast(fast, quantisation)
    request = AttentionRequest(
        query.dtype,
        pages.dtype,
        query.shape[1],
        pages.shape[1],
        page_layout.head_dim,
        page_layout.block_size,
        quantisation,
    )
    return operator.bind(signature, request, pages, page_layout)


def _check_tensors(
    query: torch.Tensor, pages: torch.Tensor, out: torch.Tensor, layout: PageLayout
) -> None:
    checks.check_pages(pages, layout)
    checks.check_tokens("query", query, layout.head_dim)
    checks.check_tokens("out", out, layout.head_dim)
    if out.shape[1:] != query.shape[1:] or out.dtype != query.dtype:
        raise batch_checks.out_differs(query, out)
    if query.shape[1] % pages.shape[1]:
        raise ValueError(
            f"{query.shape[1]} query heads are not a multiple of the pages' {pages.shape[1]} "
            "kv heads."
        )


def _check_scores(
    num_heads: int,
    window: int,
    soft_cap: float,
    alibi_slopes: torch.Tensor | None,
    sinks: torch.Tensor | None,
) -> None:
    if window < 0 or soft_cap < 0:
        raise ValueError(
            f"window={window} and soft_cap={soft_cap} must not be negative; 0 means none."
        )
    if alibi_slopes is None and sinks is None:  # as in most calls: a loop takes time
        return
    for name, tensor in (("alibi_slopes", alibi_slopes), ("sinks", sinks)):
        if tensor is None:
            continue
        if tensor.dtype != torch.float32 or list(tensor.shape) != [num_heads]:
            raise ValueError(
                f"{name} must be float32 [{num_heads}] (query heads), got {tensor.dtype} "
                f"{list(tensor.shape)}."
            )
        if not tensor.is_contiguous():
            raise ValueError(f"{name} must be contiguous; call .contiguous().")


def _fake(
    query: torch.Tensor,
    pages: torch.Tensor,
    out: torch.Tensor,
    query_start_loc: torch.Tensor,
    seq_lens: torch.Tensor,
    block_table: torch.Tensor,
    layout: list[int],
    scale: float,
    causal: bool = True,
    window: int = 0,
    soft_cap: float = 0.0,
    alibi_slopes: torch.Tensor | None = None,
    sinks: torch.Tensor | None = None,
    channel_scales: torch.Tensor | None = None,
    fast: bool = False,
) -> None:
    return None


register(SCHEMA, cpu=_cpu, fake=_fake)
