"""The meaning of ``kv_cache_write`` in plain torch."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

import torch

from ..dispatch import Support
from ..nz import PatchPool, page_patches, page_planes, page_scales
from ..page_layout import PageLayout, PatchCode, Quantisation, column_group
from ..quantise import (
    encode_patches,
    outliers,
    quantise_dynamic,
    quantise_static,
    rotate,
    valid_tags,
)

if TYPE_CHECKING:
    from . import WriteRequest

#: Places in ``counters``.
WRITTEN, SATURATED, PATCHED, OVERFLOWED = range(4)


class Places(NamedTuple):
    """Where tokens go: int64 ``[written]`` each.

    Attributes:
        block: the page.
        offset: the token inside the block.
    """

    block: torch.Tensor
    offset: torch.Tensor


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
    *,
    channel_scales: torch.Tensor | None = None,
    patch_thresholds: Sequence[float] = (),
    counters: torch.Tensor | None = None,
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
    places = Places(slots // layout.block_size, slots % layout.block_size)
    rows = [tokens[: keep.shape[0]][keep] for tokens in (key, value)]
    counts = torch.zeros(4, dtype=torch.int64)
    if layout.quantisation == Quantisation.NONE:
        _put(pages, layout, places, [tokens.to(pages.dtype) for tokens in rows])
    elif layout.quantisation == Quantisation.C8D:
        _write_dynamic(pages, layout, places, rows, counts)
    else:
        assert channel_scales is not None  # checked by the operator
        _write_static(pages, layout, places, rows, channel_scales, patch_thresholds, counts)
    if counters is not None:
        counters += counts


def _put(
    pages: torch.Tensor, layout: PageLayout, places: Places, codes: Sequence[torch.Tensor]
) -> None:
    """Store elements ``[written, kv_heads, head_dim]`` of K and V, padding columns as 0."""
    c0 = column_group(pages.element_size())
    padding = -layout.head_dim % c0
    for plane, tokens in zip(page_planes(pages, layout), codes, strict=True):
        columns = torch.nn.functional.pad(tokens, (0, padding))
        # plane[block, :, :, offset] is [written, kv_heads, padded_head_dim / C0, C0]
        plane[places.block, :, :, places.offset] = columns.unflatten(-1, (-1, c0))


def _write_dynamic(
    pages: torch.Tensor,
    layout: PageLayout,
    places: Places,
    rows: Sequence[torch.Tensor],
    counts: torch.Tensor,
) -> None:
    key, value = rows
    quantised = [quantise_dynamic(tokens) for tokens in (rotate(key.float()), value)]
    _put(pages, layout, places, [each.codes for each in quantised])
    for scales, each in zip(page_scales(pages, layout), quantised, strict=True):
        scales[places.block, :, places.offset] = each.scales
        counts[WRITTEN] += each.scales.numel()


def _write_static(
    pages: torch.Tensor,
    layout: PageLayout,
    places: Places,
    rows: Sequence[torch.Tensor],
    channel_scales: torch.Tensor,
    thresholds: Sequence[float],
    counts: torch.Tensor,
) -> None:
    quantised = [quantise_static(*each) for each in zip(rows, channel_scales, strict=True)]
    _put(pages, layout, places, [each.codes for each in quantised])
    for each in quantised:
        counts[WRITTEN] += each.saturated.numel()
        counts[SATURATED] += each.saturated.sum()
    if layout.quantisation != Quantisation.C8P:
        return
    for i, pool in enumerate(page_patches(pages, layout)):
        residual = quantised[i].residual
        wanted = outliers(rows[i], residual, channel_scales[i], thresholds[i])
        _write_patches(pool, layout, places, residual, wanted, counts)


def _write_patches(
    pool: PatchPool,
    layout: PageLayout,
    places: Places,
    residual: torch.Tensor,
    wanted: torch.Tensor,
    counts: torch.Tensor,
) -> None:
    """Give outliers their slots, and take away stale patches, in the order of the tokens.

    Args:
        pool: K's patches, or V's.
        layout: byte map of the pages.
        places: where the tokens went.
        residual: ``[written, kv_heads, head_dim]``.
        wanted: bool ``[written, kv_heads]``, the outliers.
        counts: what to count in.
    """
    code, slots = PatchCode(layout.patch_code), layout.patch_slots
    slot = places.offset % slots
    for some in _without_collisions(places.block * slots + slot):
        block, token, own = places.block[some], places.offset[some, None], slot[some, None]
        tags = pool.tags[block, :, slot[some]]  # [some, kv_heads]
        # The tag of a later token is stale: what lies behind the token being written belongs to a
        # rejected draft, or to the block's previous use.
        taken = valid_tags(tags, own, slots, token)
        outlier = wanted[some]
        tags = torch.where(taken, tags, torch.where(outlier, token + 1, 0).to(tags.dtype))
        pool.tags[block, :, slot[some]] = tags
        row, head = (outlier & ~taken).nonzero(as_tuple=True)
        patches = encode_patches(residual[some[row], head], code)
        pool.scales[block[row], head, slot[some[row]]] = patches.scales
        pool.codes[block[row], head, slot[some[row]]] = patches.codes
        counts[PATCHED] += row.numel()
        counts[OVERFLOWED] += (outlier & taken).sum()


def _without_collisions(slots: torch.Tensor) -> Iterator[torch.Tensor]:
    """Cut tokens ``[written]`` into groups in which no slot occurs twice, keeping their order."""
    order = slots.argsort(stable=True)
    slots = slots[order]
    places = torch.arange(slots.numel())
    starts = torch.ones_like(slots, dtype=torch.bool)
    starts[1:] = slots[1:] != slots[:-1]
    nth = places - torch.where(starts, places, 0).cummax(0).values  # nth token of its slot
    for n in range(int(nth.max()) + 1 if nth.numel() else 0):
        yield order[nth == n]
