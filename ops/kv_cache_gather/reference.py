"""The meaning of ``kv_cache_gather`` in plain torch."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

import torch

from ..dispatch import Support
from ..nz import from_nz, page_planes
from ..page_layout import PageLayout, Quantisation
from ..quantise import dequantise_pages

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
        used.append(_used_blocks(pages, blocks, length, layout.block_size))
    for blocks, start, length in zip(used, starts.tolist(), seq_lens.tolist(), strict=True):
        planes = _values(pages[blocks], layout, channel_scales, compute_dtype)
        for target, plane in zip((key, value), planes, strict=True):
            # [blocks, kv_heads, block_size, head_dim] -> [blocks * block_size, kv_heads, head_dim]
            rows = plane.transpose(1, 2).flatten(0, 1)[:length]
            target[start : start + length] = rows.to(target.dtype)


def _used_blocks(
    pages: torch.Tensor, block_row: torch.Tensor, length: int, block_size: int
) -> torch.Tensor:
    """Return the ids of the blocks that hold ``length`` tokens, int64."""
    used = block_row[: -(-length // block_size)].long()
    if used.numel() and not 0 <= int(used.min()) <= int(used.max()) < pages.shape[0]:
        raise ValueError(
            f"block ids {int(used.min())}..{int(used.max())} lie outside the pages, which hold "
            f"{pages.shape[0]} blocks."
        )
    return used


def _values(
    pages: torch.Tensor,
    layout: PageLayout,
    channel_scales: torch.Tensor | None,
    dtype: torch.dtype,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return K and V of whole blocks, ``[blocks, kv_heads, block_size, head_dim]`` each."""
    if layout.quantisation != Quantisation.NONE:
        return dequantise_pages(pages, layout, channel_scales, dtype)
    key, value = (from_nz(plane)[..., : layout.head_dim] for plane in page_planes(pages, layout))
    return key.to(dtype), value.to(dtype)
