"""The meaning of ``paged_attention`` in plain torch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import TYPE_CHECKING

import torch

from ..dispatch import Support
from ..page_layout import PageLayout
from ..page_values import block_values, used_blocks

if TYPE_CHECKING:
    from . import AttentionRequest


@dataclass(frozen=True, slots=True)
class Scores:
    """How scores are made from dot products; names as in the operator."""

    scale: float
    causal: bool
    window: int
    soft_cap: float
    alibi_slopes: torch.Tensor | None
    sinks: torch.Tensor | None


def supports(request: AttentionRequest) -> Support:
    """Serve everything: this is the meaning of the operator."""
    return Support(True, "plain torch")


def bind(pages: torch.Tensor, layout: PageLayout) -> Callable[..., None]:
    """Return the operator for pages of one layout."""
    return partial(paged_attention, layout=layout)


def paged_attention(
    query: torch.Tensor,
    pages: torch.Tensor,
    out: torch.Tensor,
    query_start_loc: torch.Tensor,
    seq_lens: torch.Tensor,
    block_table: torch.Tensor,
    layout: PageLayout,
    *,
    scale: float,
    causal: bool,
    window: int,
    soft_cap: float,
    alibi_slopes: torch.Tensor | None,
    sinks: torch.Tensor | None,
    channel_scales: torch.Tensor | None = None,
    fast: bool = False,
    compute_dtype: torch.dtype = torch.float32,
) -> None:
    """Attend one sequence after the other; see the operator's documentation.

    Args:
        query: as in the operator, like every argument not named here.
        fast: changes nothing: the reference has one precision.
        compute_dtype: type of all arithmetic; float64 makes this an oracle for tests.

    Raises:
        ValueError: a block id that is used lies outside the pages.
    """
    attended = []  # kept until every block id is known to be good
    for i, (start, stop) in enumerate(pairwise(query_start_loc.tolist())):
        length, count = int(seq_lens[i]), stop - start
        if count <= 0:
            continue
        # Tokens before the first row's window are not read: their blocks may be freed.
        first = max(0, length - count - window + 1) if window else 0
        blocks = used_blocks(pages, block_table[i], layout.block_size, first, length)
        values = block_values(pages[blocks], layout, channel_scales, compute_dtype)
        key, value = (_tokens(v, first % layout.block_size, length - first) for v in values)
        result = _attend(
            query[start:stop].to(compute_dtype),
            key,
            value,
            torch.arange(length - count, length),
            torch.arange(first, max(length, first)),
            Scores(scale, causal, window, soft_cap, alibi_slopes, sinks),
        )
        attended.append((slice(start, stop), result.to(out.dtype)))
    for rows, result in attended:
        out[rows] = result


def _tokens(plane: torch.Tensor, skip: int, count: int) -> torch.Tensor:
    """Return ``count`` tokens after the first ``skip`` ones, ``[count, kv_heads, head_dim]``."""
    # [blocks, kv_heads, block_size, head_dim] -> [blocks * block_size, kv_heads, head_dim]
    return plane.transpose(1, 2).flatten(0, 1)[skip : skip + max(count, 0)]


def _attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    positions: torch.Tensor,
    tokens: torch.Tensor,
    scores: Scores,
) -> torch.Tensor:
    """Attend one sequence: query ``[n, heads, d]``, key and value ``[t, kv_heads, d]``."""
    group = query.shape[1] // key.shape[1]
    key = key.repeat_interleave(group, dim=1)
    value = value.repeat_interleave(group, dim=1)
    s = torch.einsum("nhd,thd->hnt", query, key) * scores.scale
    if scores.soft_cap:
        s = scores.soft_cap * torch.tanh(s / scores.soft_cap)
    distance = tokens[None, :] - positions[:, None]  # [n, t], negative in the past
    if scores.alibi_slopes is not None:
        s = s + scores.alibi_slopes.to(s.dtype)[:, None, None] * distance
    visible = torch.ones_like(distance, dtype=torch.bool)
    if scores.causal:
        visible &= distance <= 0
    if scores.window:
        visible &= distance.abs() < scores.window
    s = s.masked_fill(~visible, -torch.inf)
    if scores.sinks is not None:
        sink = scores.sinks.to(s.dtype)[:, None, None].expand(-1, s.shape[1], 1)
        s = torch.cat([s, sink], dim=-1)
    p = torch.softmax(s, dim=-1)[..., : tokens.numel()]
    blind = ~visible.any(dim=-1)  # [n]: a row that sees nothing becomes zero, not 0 / 0
    return torch.einsum("hnt,thd->nhd", p.masked_fill(blind[:, None], 0.0), value)
