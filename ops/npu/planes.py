"""Pages of the arrangement ``PLANE_MAJOR`` as the arrays that the fused operators take."""

from __future__ import annotations

from typing import NamedTuple

import torch

from .. import checks
from ..page_layout import (
    TOKENS_PER_PATCH_SLOT,
    PatchCode,
    PlaneLayout,
    Quantisation,
    column_group,
    padded_head_dim,
)


class Planes(NamedTuple):
    """Views of one layer's pages. ``P = 2 * num_blocks - 1``; block ``b`` has the index ``2 * b``.

    K and V of a block are neighbours, and the fused operators want contiguous arrays: K's array
    starts at the first plane, V's at the second, and both count every plane of either.

    Attributes:
        key: ``[P, kv_heads, head_dim / C0, block_size, C0]``, contiguous.
        value: the same, one plane further.
        key_scales: C8D: float32 ``[P, kv_heads, block_size]``, contiguous.
        value_scales: the same, one plane further.
        scales: C8D: float32 ``[2 * num_blocks, kv_heads, block_size]``, K's at even indices.
        patches: C8P: uint8 ``[2 * num_blocks, kv_heads, pool_bytes]``, K's at even indices.
    """

    key: torch.Tensor
    value: torch.Tensor
    key_scales: torch.Tensor | None = None
    value_scales: torch.Tensor | None = None
    scales: torch.Tensor | None = None
    patches: torch.Tensor | None = None

    @property
    def num_blocks(self) -> int:
        """How many blocks there are."""
        return (self.key.shape[0] + 1) // 2

    @property
    def extras(self) -> torch.Tensor | None:
        """What lies behind all planes of K and V: scales, patches, or nothing."""
        return self.scales if self.scales is not None else self.patches


def page_planes(pages: torch.Tensor, layout: PlaneLayout) -> Planes:
    """Return the views of pages ``[num_blocks, kv_heads, block_size, content]``.

    Raises:
        ValueError: the pages are not contiguous, or not of this layout.
    """
    check_pages(pages, layout)
    blocks, heads, size = pages.shape[0], layout.num_kv_heads, layout.block_size
    c0 = column_group(pages.element_size())
    columns = padded_head_dim(layout.head_dim, pages.element_size())
    shape = (2 * blocks - 1, heads, columns // c0, size, c0)
    plane = heads * columns * size
    flat = pages.view(-1)
    key, value = (flat[i * plane : (i + 2 * blocks - 1) * plane].view(shape) for i in range(2))
    start = 2 * blocks * plane
    if layout.quantisation == Quantisation.C8P:
        stop = start + 2 * blocks * heads * layout.pool_bytes
        pools = flat[start:stop].view(torch.uint8).view(2 * blocks, heads, layout.pool_bytes)
        return Planes(key, value, patches=pools)
    if layout.quantisation != Quantisation.C8D:
        return Planes(key, value)
    stop = start + 2 * blocks * heads * size * torch.float32.itemsize
    scales = flat[start:stop].view(torch.float32).view(2 * blocks, heads, size)
    return Planes(key, value, scales[:-1], scales[1:], scales)


def check_pages(pages: torch.Tensor, layout: PlaneLayout) -> None:
    """Refuse pages that do not match their layout.

    Raises:
        ValueError: element type, shape or order in memory differ.
    """
    quantisation = Quantisation(layout.quantisation)
    checks.check_page_dtype(pages.dtype, quantisation)
    checks.check_block_size(layout.block_size)
    checks.check_head_dim(layout.head_dim)
    _check_slots(layout, quantisation)
    wanted = (layout.num_kv_heads, layout.block_size)
    if pages.dim() != 4 or pages.shape[0] < 1 or tuple(pages.shape[1:3]) != wanted:
        raise ValueError(
            f"pages must be [blocks, {wanted[0]} (kv heads), {wanted[1]} (block size), content], "
            f"got {list(pages.shape)}."
        )
    itemsize = pages.element_size()
    needed = 2 * padded_head_dim(layout.head_dim, itemsize) * itemsize
    needed += 8 if quantisation is Quantisation.C8D else 0
    needed += 2 * layout.pool_bytes // layout.block_size
    if pages.shape[3] * itemsize < needed:
        raise ValueError(
            f"a (kv head, token) of pages holds {pages.shape[3] * itemsize} bytes, {needed} are "
            "needed; make pages and layout from one PageFormat."
        )
    if not pages.is_contiguous():
        raise ValueError(
            "the fused operators of the NPU take contiguous pages, as in vLLM's KV cache layout "
            f"LBHNC; got strides {pages.stride()}. Unset VLLM_KV_CACHE_LAYOUT."
        )


def _check_slots(layout: PlaneLayout, quantisation: Quantisation) -> None:
    patched = quantisation is Quantisation.C8P
    wanted = layout.block_size // TOKENS_PER_PATCH_SLOT if patched else 0
    if layout.patch_slots != wanted or layout.patch_code not in tuple(PatchCode):
        raise ValueError(
            f"{quantisation.name.lower()} pages have {wanted} patch slots and a code of "
            f"{[int(code) for code in PatchCode]}, the layout says {layout.patch_slots} and "
            f"{layout.patch_code}; make it with PageFormat.plane_layout()."
        )


def plane_slots(
    slot_mapping: torch.Tensor, block_size: int, out: torch.Tensor | None = None
) -> torch.Tensor:
    """Return slots among planes, int32, for slots among blocks; negative ones stay negative.

    Args:
        slot_mapping: int64 ``[tokens]``, ``block * block_size + offset``.
        block_size: tokens in a block.
        out: int32 ``[tokens]`` to write to, whose address a captured graph may know.
    """
    blocks = torch.div(slot_mapping, block_size, rounding_mode="floor")
    slots = torch.add(slot_mapping, blocks, alpha=block_size)
    if out is None:
        return slots.to(torch.int32)
    out.copy_(slots)
    return out


def plane_blocks(block_table: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
    """Return indices of planes, int32 ``[sequences, max_blocks]``, for block ids."""
    return torch.mul(block_table, 2, out=out)
