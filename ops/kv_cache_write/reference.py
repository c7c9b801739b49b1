"""The meaning of ``kv_cache_write`` in plain torch."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

import torch

from ..dispatch import Support
from ..nz import page_planes
from ..page_layout import PageLayout, column_group

if TYPE_CHECKING:
    from . import WriteRequest


def supports(request: WriteRequest) -> Support:
    """Serve everything: this is the meaning of the operator."""
    return Support(True, "plain torch")


def bind(pages: torch.Tensor, layout: PageLayout) -> Callable[..., None]:
    """Return the operator for pages of one layout."""
    return partial(kv_cache_write, layout=layout)


def kv_cache_write(
    key: torch.Tensor,
    value: torch.Tensor,
    pages: torch.Tensor,
    slot_mapping: torch.Tensor,
    layout: PageLayout,
) -> None:
    """Scatter tokens into the K and V planes; see the operator's documentation.

    Raises:
        ValueError: a slot lies outside the pages.
    """
    keep = slot_mapping >= 0  # padding slots are negative
    slots = slot_mapping[keep]  # [written]
    limit = pages.shape[0] * layout.block_size
    if bool((slots >= limit).any()):
        raise ValueError(f"slot {int(slots.max())} lies outside the pages, which hold {limit}.")
    block, offset = slots // layout.block_size, slots % layout.block_size
    c0 = column_group(pages.element_size())
    for plane, tokens in zip(page_planes(pages, layout), (key, value), strict=True):
        # plane[block, :, :, offset] is [written, kv_heads, head_dim / C0, C0]
        plane[block, :, :, offset] = (
            tokens[: keep.shape[0]][keep].unflatten(-1, (-1, c0)).to(pages.dtype)
        )
