"""Pages of latents (multi-head latent attention, MLA): views, values and checks.

A page is ``latents | rotary parts | scales`` of one block, shared by all query heads. The latents
are the compressed K and V of DeepSeek-V2 (arXiv:2405.04434, section 2.1): with the up-projections
absorbed into query and output, a latent is both the key (beside the rotary part) and the value.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from . import checks
from .nz import from_nz
from .page_layout import (
    LatentLayout,
    LatentPlaneLayout,
    Quantisation,
    column_group,
    padded_head_dim,
)

#: What kernels hold in their buffers; every published model fits (DeepSeek-V2, -V3: 512 and 64).
MAX_LATENT_DIM = 512
MAX_ROTARY_DIM = 128

#: Latents are post-norm and have no rotated form; patches (C8P) are not defined for them.
QUANTISATIONS = (Quantisation.NONE, Quantisation.C8D, Quantisation.C8S)

#: The rotary part of int8 pages stays this: it is a ninth of a token, and carries the position.
ROTARY_DTYPE = torch.bfloat16


def rotary_dtype(page_dtype: torch.dtype) -> torch.dtype:
    """Return the element type of the rotary part in pages of an element type."""
    return ROTARY_DTYPE if page_dtype == torch.int8 else page_dtype


def check_dims(latent_dim: int, rotary_dim: int) -> None:
    """Refuse sizes that pages of latents cannot hold.

    Raises:
        ValueError: not multiples of 16 up to 512 and 128.
    """
    step = checks.HEAD_DIM_MULTIPLE
    for name, size, limit in (
        ("latent dimension (kv_lora_rank)", latent_dim, MAX_LATENT_DIM),
        ("rotary dimension (qk_rope_head_dim)", rotary_dim, MAX_ROTARY_DIM),
    ):
        if not 0 < size <= limit or size % step:
            raise ValueError(
                f"{name} {size} is not supported; allowed are multiples of {step} up to {limit}. "
                "Use --attention-backend CPU_MLA to serve this model with vLLM's own CPU attention."
            )


def check_quantisation(quantisation: int) -> None:
    """Refuse variants that latents do not have.

    Raises:
        ValueError: another than none, c8d or c8s.
    """
    if quantisation not in QUANTISATIONS:
        names = ", ".join("none" if q == 0 else q.name.lower() for q in QUANTISATIONS)
        raise ValueError(
            f"quantisation {quantisation} is not defined for latents; allowed are {names}. Set "
            "kv_cache.variant to 'c8d' or 'c8s'."
        )


def latent_layout(layout: Sequence[int]) -> LatentLayout:
    """Return the byte map that an operator was given as plain integers.

    Raises:
        ValueError: too few or too many numbers.
    """
    return LatentLayout(*checks.as_many(layout, LatentLayout._fields, "LatentPageFormat.layout()"))


def latent_plane_layout(layout: Sequence[int]) -> LatentPlaneLayout:
    """Return what an operator of the NPU was told about its pages as plain integers.

    Raises:
        ValueError: too few or too many numbers.
    """
    maker = "LatentPageFormat.plane_layout()"
    return LatentPlaneLayout(*checks.as_many(layout, LatentPlaneLayout._fields, maker))


def check_pages(pages: torch.Tensor, layout: LatentLayout) -> None:
    """Refuse pages that do not match their layout.

    Raises:
        ValueError: rank, block size, bytes of a page, offsets or order in memory differ.
    """
    check_quantisation(layout.quantisation)
    checks.check_page_dtype(pages.dtype, Quantisation(layout.quantisation))
    checks.check_block_size(layout.block_size)
    check_dims(layout.latent_dim, layout.rotary_dim)
    if pages.dim() != 3 or pages.shape[1] != layout.block_size:
        raise ValueError(
            f"pages of latents must be [blocks, {layout.block_size} (block size), content], got "
            f"{list(pages.shape)}."
        )
    page_bytes = pages.shape[1] * pages.shape[2] * pages.element_size()
    if page_bytes != layout.page_bytes:
        raise ValueError(
            f"a block of pages holds {page_bytes} bytes, its layout says {layout.page_bytes}; make "
            "both from one LatentPageFormat."
        )
    _check_offsets(pages, layout)
    if pages.stride(2) != 1 or pages.stride(1) != pages.shape[2]:
        raise ValueError(
            "pages must be contiguous within a block, as in vLLM's KV cache layouts LBHNC and "
            f"BLHNC; got strides {pages.stride()}. Unset VLLM_KV_CACHE_LAYOUT."
        )
    if layout.quantisation and pages.stride(0) % 4:
        raise ValueError(
            "int8 pages hold bfloat16 and float32, so blocks must lie whole multiples of 4 bytes "
            f"apart; got strides {pages.stride()}. Pad pages to such a multiple."
        )


def _check_offsets(pages: torch.Tensor, layout: LatentLayout) -> None:
    size, itemsize = layout.block_size, pages.element_size()
    rotary_item = rotary_dtype(pages.dtype).itemsize
    latent_bytes = size * padded_head_dim(layout.latent_dim, itemsize) * itemsize
    arrays = [("rotary_offset", latent_bytes, size * layout.rotary_dim * rotary_item, rotary_item)]
    if layout.quantisation == Quantisation.C8D:
        arrays.append(("scales_offset", latent_bytes, size * 4, 4))
    for name, first, nbytes, alignment in arrays:
        offset = getattr(layout, name)
        if not first <= offset <= layout.page_bytes - nbytes or offset % alignment:
            raise ValueError(
                f"{name} {offset} does not place {nbytes} bytes of whole elements behind the "
                f"latents in a page of {layout.page_bytes} bytes; make it from a LatentPageFormat."
            )


def check_rows(name: str, tensor: torch.Tensor, shape: Sequence[int], what: str) -> None:
    """Refuse rows of the wrong rank, width, type or order.

    Args:
        name: of the argument.
        tensor: ``[tokens, *shape]``; the last dimension contiguous.
        shape: wanted after the first dimension; -1: any.
        what: the wanted shape in words.

    Raises:
        ValueError: something differs.
    """
    fits = tensor.dim() == len(shape) + 1 and all(
        want in (-1, got) for got, want in zip(tensor.shape[1:], shape, strict=True)
    )
    if not fits:
        raise ValueError(f"{name} must be {what}, got {list(tensor.shape)}.")
    if not checks.rows_contiguous(tensor):
        raise ValueError(f"{name} must be contiguous in its last dimension; call .contiguous().")
    checks.check_float(name, tensor.dtype)


def check_channel_scales(
    scales: torch.Tensor | None, layout: LatentLayout | LatentPlaneLayout
) -> None:
    """Refuse static scales that are missing, of another shape or not wanted.

    Raises:
        ValueError: they do not go with the pages.
    """
    static = layout.quantisation == Quantisation.C8S
    if scales is None:
        if static:
            raise ValueError(
                f"c8s pages need channel_scales, float32 [{layout.latent_dim}] (the latent's); "
                "give the layer's scales, or use c8d pages, which need none."
            )
        return
    if not static:
        raise ValueError("channel_scales belong to c8s pages, these are not. Leave them out.")
    if scales.dtype != torch.float32 or list(scales.shape) != [layout.latent_dim]:
        raise ValueError(
            f"channel_scales must be float32 [{layout.latent_dim}] (latent dimension), got "
            f"{scales.dtype} {list(scales.shape)}; repeat a scale of the whole layer."
        )
    if not scales.is_contiguous():
        raise ValueError("channel_scales must be contiguous; call .contiguous().")


def latent_planes(pages: torch.Tensor, layout: LatentLayout) -> torch.Tensor:
    """Return a view of the latents, ``[blocks, padded latent_dim / C0, block_size, C0]``.

    Args:
        pages: ``[blocks, block_size, content]``.
        layout: their byte map.
    """
    columns = padded_head_dim(layout.latent_dim, pages.element_size())
    return _fractals(_array(pages, 0, layout.block_size * columns, pages.dtype), layout.block_size)


def rotary_planes(pages: torch.Tensor, layout: LatentLayout) -> torch.Tensor:
    """Return a view of the rotary parts, ``[blocks, rotary_dim / C0, block_size, C0]``."""
    count = layout.block_size * layout.rotary_dim
    rotary = _array(pages, layout.rotary_offset, count, rotary_dtype(pages.dtype))
    return _fractals(rotary, layout.block_size)


def latent_scales(pages: torch.Tensor, layout: LatentLayout) -> torch.Tensor:
    """Return a view of the scales of C8D pages, float32 ``[blocks, block_size]``."""
    return _array(pages, layout.scales_offset, layout.block_size, torch.float32)


def latent_values(
    pages: torch.Tensor,
    layout: LatentLayout,
    channel_scales: torch.Tensor | None,
    dtype: torch.dtype,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the values that pages stand for; garbage where no token was written.

    Args:
        pages: ``[blocks, block_size, content]``.
        layout: their byte map.
        channel_scales: C8S: float32 ``[latent_dim]``.
        dtype: of the arithmetic and of the result.

    Returns:
        Latents ``[blocks, block_size, latent_dim]`` and rotary parts
        ``[blocks, block_size, rotary_dim]``.
    """
    latent = from_nz(latent_planes(pages, layout))[..., : layout.latent_dim].to(dtype)
    if layout.quantisation == Quantisation.C8D:
        latent = latent * latent_scales(pages, layout).to(dtype)[..., None]
    elif channel_scales is not None:
        latent = latent * channel_scales.to(dtype)
    return latent, from_nz(rotary_planes(pages, layout)).to(dtype)


def _array(pages: torch.Tensor, offset: int, count: int, dtype: torch.dtype) -> torch.Tensor:
    """Return a view ``[blocks, count]`` of an array inside every page."""
    itemsize = pages.element_size()
    raw = pages.as_strided(
        (pages.shape[0], count * dtype.itemsize // itemsize),
        (pages.stride(0), 1),
        pages.storage_offset() + offset // itemsize,
    )
    return raw.view(dtype)


def _fractals(array: torch.Tensor, block_size: int) -> torch.Tensor:
    c0 = column_group(array.element_size())
    fractals: torch.Tensor = array.unflatten(-1, (-1, block_size, c0))
    return fractals
