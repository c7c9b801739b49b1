"""The meaning of ``mla_attention`` in plain torch."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

import torch

from ..dispatch import Support
from ..latent import latent_values
from ..page_layout import LatentLayout
from ..page_values import used_blocks

if TYPE_CHECKING:
    from . import LatentAttentionRequest


def supports(request: LatentAttentionRequest) -> Support:
    """Serve everything: this is the meaning of the operator."""
    return Support(True, "plain torch")


def bind(pages: torch.Tensor, layout: LatentLayout) -> Callable[..., None]:
    """Return the operator for pages of one layout."""
    return partial(mla_attention, layout=layout)


def mla_attention(
    query: torch.Tensor,
    query_rotary: torch.Tensor,
    pages: torch.Tensor,
    out: torch.Tensor,
    query_start_loc: torch.Tensor,
    seq_lens: torch.Tensor,
    block_table: torch.Tensor,
    layout: LatentLayout,
    *,
    scale: float,
    causal: bool,
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
    starts = query_start_loc.tolist()
    attended = []  # kept until every block id is known to be good
    for i, length in enumerate(seq_lens.tolist()):
        rows = slice(starts[i], starts[i + 1])
        count = rows.stop - rows.start
        if count <= 0:
            continue
        blocks = used_blocks(pages, block_table[i], layout.block_size, 0, length)
        values = latent_values(pages[blocks], layout, channel_scales, compute_dtype)
        latent, rotary = (part.flatten(0, 1)[:length] for part in values)  # [length, dim]
        scores = torch.einsum("nhd,td->hnt", query[rows].to(compute_dtype), latent)
        scores += torch.einsum("nhd,td->hnt", query_rotary[rows].to(compute_dtype), rotary)
        positions = torch.arange(length - count, length)
        visible = torch.ones(count, length, dtype=torch.bool)
        if causal:
            visible = torch.arange(length) <= positions[:, None]
        blind = ~visible.any(-1)  # [count]: a row that sees nothing becomes zero, not 0 / 0
        weights = torch.softmax((scores * scale).masked_fill(~visible, -torch.inf), dim=-1)
        weights = weights.masked_fill(blind[:, None], 0.0)
        attended.append((rows, torch.einsum("hnt,td->nhd", weights, latent).to(out.dtype)))
    for rows, result in attended:
        out[rows] = result
