"""Pages of latents in the arrangement ``PLANE_MAJOR`` as the arrays that operators take."""

from __future__ import annotations

from typing import NamedTuple

import torch

from .. import checks, latent
from ..page_layout import LatentPlaneLayout, Quantisation, column_group, padded_head_dim


class LatentPlanes(NamedTuple):
    """Views of one layer's pages of latents; block ``b`` has the index ``b`` in each.

    Attributes:
        latents: ``[blocks, 1, latent_dim / C0, block_size, C0]``, contiguous: keys and values.
        rotary: ``[blocks, 1, rotary_dim / 16, block_size, 16]``, contiguous.
        scales: C8D: float32 ``[blocks, block_size]``, contiguous.
    """

    latents: torch.Tensor
    rotary: torch.Tensor
    scales: torch.Tensor | None = None

    @property
    def block_size(self) -> int:
        """Tokens in a block."""
        return self.latents.shape[3]


def page_latents(pages: torch.Tensor, layout: LatentPlaneLayout) -> LatentPlanes:
    """Return the views of pages ``[num_blocks, block_size, content]``.

    Raises:
        ValueError: the pages are not contiguous, or not of this layout.
    """
    check_pages(pages, layout)
    blocks, size = pages.shape[0], layout.block_size
    raw = pages.view(-1).view(torch.uint8)
    start = 0

    def take(dtype: torch.dtype, *shape: int) -> torch.Tensor:
        nonlocal start
        nbytes = torch.Size(shape).numel() * dtype.itemsize
        found = raw[start : start + nbytes].view(dtype).view(shape)
        start += nbytes
        return found

    latents = take(pages.dtype, *_shape(blocks, layout.latent_dim, size, pages.dtype))
    turned = latent.rotary_dtype(pages.dtype)
    rotary = take(turned, *_shape(blocks, layout.rotary_dim, size, turned))
    scaled = layout.quantisation == Quantisation.C8D
    return LatentPlanes(latents, rotary, take(torch.float32, blocks, size) if scaled else None)


def _shape(
    blocks: int, columns: int, block_size: int, dtype: torch.dtype
) -> tuple[int, int, int, int, int]:
    c0 = column_group(dtype.itemsize)
    return (blocks, 1, padded_head_dim(columns, dtype.itemsize) // c0, block_size, c0)


def check_pages(pages: torch.Tensor, layout: LatentPlaneLayout) -> None:
    """Refuse pages that do not match their layout.

    Raises:
        ValueError: element type, shape or order in memory differ.
    """
    latent.check_quantisation(layout.quantisation)
    checks.check_page_dtype(pages.dtype, Quantisation(layout.quantisation))
    checks.check_block_size(layout.block_size)
    latent.check_dims(layout.latent_dim, layout.rotary_dim)
    if pages.dim() != 3 or pages.shape[0] < 1 or pages.shape[1] != layout.block_size:
        raise ValueError(
            f"pages of latents must be [blocks, {layout.block_size} (block size), content], got "
            f"{list(pages.shape)}."
        )
    itemsize = pages.element_size()
    needed = padded_head_dim(layout.latent_dim, itemsize) * itemsize
    needed += layout.rotary_dim * latent.rotary_dtype(pages.dtype).itemsize
    needed += 4 if layout.quantisation == Quantisation.C8D else 0
    if pages.shape[2] * itemsize < needed:
        raise ValueError(
            f"a token of pages holds {pages.shape[2] * itemsize} bytes, {needed} are needed; make "
            "pages and layout from one LatentPageFormat."
        )
    if not pages.is_contiguous():
        raise ValueError(
            "the fused operators of the NPU take contiguous pages, as in vLLM's KV cache layout "
            f"LBHNC; got strides {pages.stride()}. Unset VLLM_KV_CACHE_LAYOUT."
        )
