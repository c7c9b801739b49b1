"""The meaning of ``kv_cache_gather`` in plain torch."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

import torch

from ..dispatch import Support
from ..page_layout import PageLayout
from ..page_values import block_values, used_blocks

if TYPE_CHECKING:
    from . import GatherRequest


def supports(request: GatherRequest) -> Support:
    """Serve everything: this is the meaning of the operator."""
    return Support(True, "plain torch")


def bind(pages: torch.Tensor, layout: PageLayout) -> Callable[..., None]:
    """Return the operator for pages of one layout."""
    return partial(kv_cache_gather, layout=layout)


def kv_cache_gather(
    pages: torch.Tensor,
    block_table: torch.Tensor,
    seq_lens: torch.Tensor,
    starts: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    layout: PageLayout,
    *,
    channel_scales: torch.Tensor | None = None,
    compute_dtype: torch.dtype = torch.float32,
) -> None:
    """Copy one sequence after the other; see the operator's documentation.

    Args:
        pages: as in the operator, like every argument not named here.
        compute_dtype: type of the arithmetic; float64 makes this an oracle for tests.

    Raises:
        ValueError: a block id that is used lies outside the pages.
    """
    used = []  # every block id is known to be good before anything is written
    for blocks, length in zip(block_table, seq_lens.tolist(), strict=True):
        used.append(used_blocks(pages, blocks, layout.block_size, 0, length))
    for blocks, start, length in zip(used, starts.tolist(), seq_lens.tolist(), strict=True):
        planes = block_values(pages[blocks], layout, channel_scales, compute_dtype)
        for target, plane in zip((key, value), planes, strict=True):
            # [blocks, kv_heads, block_size, head_dim] -> [blocks * block_size, kv_heads, head_dim]
            rows = plane.transpose(1, 2).flatten(0, 1)[:length]
            target[start : start + length] = rows.to(target.dtype)
