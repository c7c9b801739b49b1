"""The meaning of ``mla_cache_write`` in plain torch."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

import torch

from ..dispatch import Support
from ..latent import latent_planes, latent_scales, rotary_planes
from ..page_layout import LatentLayout, Quantisation
from ..quantise import quantise_dynamic, quantise_static

if TYPE_CHECKING:
    from . import LatentWriteRequest


def supports(request: LatentWriteRequest) -> Support:
    """Serve everything: this is the meaning of the operator."""
    return Support(True, "plain torch")


def bind(pages: torch.Tensor, layout: LatentLayout) -> Callable[..., None]:
    """Return the operator for pages of one layout."""
    return partial(mla_cache_write, layout=layout)


def mla_cache_write(
    latents: torch.Tensor,
    rotary: torch.Tensor,
    pages: torch.Tensor,
    slot_mapping: torch.Tensor,
    layout: LatentLayout,
    *,
    channel_scales: torch.Tensor | None = None,
    counters: torch.Tensor | None = None,
) -> None:
    """Scatter tokens into pages; see the operator's documentation.

    Raises:
        ValueError: a slot lies outside the pages.
    """
    keep = slot_mapping >= 0  # padding slots are negative
    slots = slot_mapping[keep]  # [written]
    limit = pages.shape[0] * layout.block_size
    if bool((slots >= limit).any()):
        raise ValueError(f"slot {int(slots.max())} lies outside the pages, which hold {limit}.")
    block, offset = slots // layout.block_size, slots % layout.block_size
    rows = latents[: keep.shape[0]][keep]  # [written, latent_dim]
    codes = rows
    saturated = 0
    if layout.quantisation == Quantisation.C8D:
        dynamic = quantise_dynamic(rows)
        codes = dynamic.codes
        latent_scales(pages, layout)[block, offset] = dynamic.scales
    elif channel_scales is not None:
        static = quantise_static(rows, channel_scales)
        codes, saturated = static.codes, int(static.saturated.sum())
    _put(latent_planes(pages, layout), block, offset, codes)
    _put(rotary_planes(pages, layout), block, offset, rotary[: keep.shape[0]][keep])
    if counters is not None and layout.quantisation:
        counters += torch.tensor([slots.numel(), saturated, 0, 0])


def _put(
    planes: torch.Tensor, block: torch.Tensor, offset: torch.Tensor, rows: torch.Tensor
) -> None:
    """Store rows ``[written, columns]``, padding columns as 0."""
    c0 = planes.shape[-1]
    columns = torch.nn.functional.pad(rows.to(planes.dtype), (0, -rows.shape[-1] % c0))
    # planes[block, :, offset] is [written, columns / C0, C0]
    planes[block, :, offset] = columns.unflatten(-1, (-1, c0))
