"""NZ order in plain torch: the meaning of the layout that kernels read and write.

NZ of an (n, d) matrix is (d / C0, n, C0): columns are cut into groups of C0 elements (32 bytes)
and the rows of one group lie one after the other. The NPU's cube unit reads fractals of 16 such
rows. Source: CANN's FRACTAL_NZ format (``aclFormat`` 29).
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from .page_layout import PageLayout, column_group, padded_head_dim


def to_nz(matrix: torch.Tensor) -> torch.Tensor:
    """Return ``(..., n, d)`` in NZ order, ``(..., d / C0, n, C0)``, contiguous."""
    c0 = column_group(matrix.element_size())
    groups: torch.Tensor = matrix.unflatten(-1, (-1, c0))  # (..., n, d / C0, C0)
    return groups.movedim(-2, -3).contiguous()


def from_nz(fractals: torch.Tensor) -> torch.Tensor:
    """Return NZ ``(..., d / C0, n, C0)`` as ``(..., n, d)``, contiguous."""
    return fractals.movedim(-3, -2).flatten(-2).contiguous()


def page_planes(pages: torch.Tensor, layout: PageLayout) -> tuple[torch.Tensor, torch.Tensor]:
    """Return views of K and V inside pages.

    Args:
        pages: ``[num_blocks, num_kv_heads, block_size, content]`` in the page's element type; the
            last two dimensions contiguous, blocks and heads at any stride.
        layout: byte map of one (block, kv head) run.

    Returns:
        Two views ``[num_blocks, num_kv_heads, padded_head_dim / C0, block_size, C0]``; what
        columns beyond ``head_dim`` hold is undefined.
    """
    itemsize = pages.element_size()
    c0 = column_group(itemsize)
    columns = padded_head_dim(layout.head_dim, itemsize)
    shape = (pages.shape[0], pages.shape[1], columns // c0, layout.block_size, c0)
    strides = (pages.stride(0), pages.stride(1), layout.block_size * c0, c0, 1)

    def plane(offset_bytes: int) -> torch.Tensor:
        offset = pages.storage_offset() + offset_bytes // itemsize
        return pages.as_strided(shape, strides, offset)

    return plane(layout.k_offset), plane(layout.v_offset)


class PatchPool(NamedTuple):
    """Views of the patches of K, or of V, inside C8P pages.

    Attributes:
        tags: int16 ``[num_blocks, num_kv_heads, slots]``; ``n + 1``: the patch of token ``n``.
        scales: float32 ``[num_blocks, num_kv_heads, slots]``.
        codes: uint8 ``[num_blocks, num_kv_heads, slots, padded_head_dim / 2]``, the even column in
            the low half.
    """

    tags: torch.Tensor
    scales: torch.Tensor
    codes: torch.Tensor


def page_scales(pages: torch.Tensor, layout: PageLayout) -> tuple[torch.Tensor, torch.Tensor]:
    """Return views of K's and V's scales inside C8D pages.

    Args:
        pages: int8 pages as in :func:`page_planes`.
        layout: byte map of one (block, kv head) run.

    Returns:
        Two float32 views ``[num_blocks, num_kv_heads, block_size]``.
    """
    size = layout.block_size
    key = _array(pages, layout.k_scales_offset, size, torch.float32)
    return key, _array(pages, layout.v_scales_offset, size, torch.float32)


def page_patches(pages: torch.Tensor, layout: PageLayout) -> tuple[PatchPool, PatchPool]:
    """Return views of K's and V's patches inside C8P pages; arguments as in :func:`page_scales`."""
    slots = layout.patch_slots
    half = padded_head_dim(layout.head_dim, 1) // 2

    def pool(offset: int) -> PatchPool:
        scales = offset + 2 * slots
        codes = _array(pages, scales + 4 * slots, slots * half, torch.uint8)
        return PatchPool(
            _array(pages, offset, slots, torch.int16),
            _array(pages, scales, slots, torch.float32),
            codes.unflatten(-1, (slots, half)),
        )

    return pool(layout.k_patches_offset), pool(layout.v_patches_offset)


def _array(pages: torch.Tensor, offset_bytes: int, count: int, dtype: torch.dtype) -> torch.Tensor:
    """Return a view ``[num_blocks, num_kv_heads, count]`` of an array inside int8 pages."""
    raw = pages.as_strided(
        (pages.shape[0], pages.shape[1], count * dtype.itemsize),
        (pages.stride(0), pages.stride(1), 1),
        pages.storage_offset() + offset_bytes,
    )
    return raw.view(dtype)
