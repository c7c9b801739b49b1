"""What references read out of pages: which blocks a sequence uses, and the values they hold."""

from __future__ import annotations

import torch

from .nz import from_nz, page_planes
from .page_layout import PageLayout, Quantisation
from .quantise import dequantise_pages


def used_blocks(
    pages: torch.Tensor, block_row: torch.Tensor, block_size: int, first: int, length: int
) -> torch.Tensor:
    """Return the ids of the blocks that hold tokens ``first .. length``, int64.

    Raises:
        ValueError: one of them is none of the pages.
    """
    used = block_row[first // block_size : (length + block_size - 1) // block_size].long()
    if used.numel() and not 0 <= int(used.min()) <= int(used.max()) < pages.shape[0]:
        raise ValueError(
            f"block ids {int(used.min())}..{int(used.max())} lie outside the pages, which hold "
            f"{pages.shape[0]} blocks."
        )
    return used


def block_values(
    pages: torch.Tensor,
    layout: PageLayout,
    channel_scales: torch.Tensor | None,
    dtype: torch.dtype,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return K and V of whole blocks, ``[blocks, kv_heads, block_size, head_dim]`` each."""
    if layout.quantisation != Quantisation.NONE:
        return dequantise_pages(pages, layout, channel_scales, dtype)
    key, value = page_planes(pages, layout)
    return from_nz(key).to(dtype), from_nz(value).to(dtype)
