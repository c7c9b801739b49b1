"""``paged_attention`` on the native CPU kernels."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from .. import native
from ..dispatch import Support
from ..page_layout import PageLayout

if TYPE_CHECKING:
    from . import AttentionRequest


def supports(request: AttentionRequest) -> Support:
    """Serve every request when a library runs on this machine."""
    return native.support()


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
) -> None:
    """Attend with the best library of this machine; see the operator's documentation."""
    native.paged_attention(
        native.load(),
        query,
        pages,
        out,
        query_start_loc,
        seq_lens,
        block_table,
        layout,
        scale=scale,
        causal=causal,
        window=window,
        soft_cap=soft_cap,
        alibi_slopes=alibi_slopes,
        sinks=sinks,
        num_threads=torch.get_num_threads(),
    )
