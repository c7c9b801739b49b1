"""Checks of operator arguments: each failure names the value, what is allowed and the remedy."""

from __future__ import annotations

from collections.abc import Hashable, Sequence

import torch

from .page_layout import PageLayout, PatchCode, PlaneLayout, Quantisation, padded_head_dim

#: Element types of pages without quantisation, and of queries, keys and values.
FLOAT_DTYPES = (torch.float32, torch.float16, torch.bfloat16)

#: Head dimensions are cut into whole 32-byte column groups of 2-byte elements.
HEAD_DIM_MULTIPLE = 16
MAX_HEAD_DIM = 256

#: The cube unit reads fractals of 16 rows, so a block holds whole fractals.
BLOCK_SIZE_MULTIPLE = 16
MAX_BLOCK_SIZE = 256


def check_head_dim(head_dim: int, head_dim_v: int | None = None) -> None:
    """Refuse head dimensions that pages cannot hold.

    Raises:
        ValueError: not a multiple of 16 up to 256, or V's dimension differs from K's.
    """
    if not 0 < head_dim <= MAX_HEAD_DIM or head_dim % HEAD_DIM_MULTIPLE:
        raise ValueError(
            f"head dimension {head_dim} is not supported; allowed are multiples of "
            f"{HEAD_DIM_MULTIPLE} up to {MAX_HEAD_DIM}. Use --attention-backend CPU_ATTN to serve "
            "this model with vLLM's own CPU attention."
        )
    if head_dim_v is not None and head_dim_v != head_dim:
        raise ValueError(
            f"V's head dimension {head_dim_v} differs from K's ({head_dim}); pages hold K and V of "
            "equal head dimension. Use --attention-backend CPU_ATTN to serve this model with "
            "vLLM's own CPU attention."
        )


def check_block_size(block_size: int) -> None:
    """Refuse block sizes that do not hold whole fractals.

    Raises:
        ValueError: not a multiple of 16 up to 256.
    """
    if not 0 < block_size <= MAX_BLOCK_SIZE or block_size % BLOCK_SIZE_MULTIPLE:
        raise ValueError(
            f"block size {block_size} is not supported; allowed are multiples of "
            f"{BLOCK_SIZE_MULTIPLE} up to {MAX_BLOCK_SIZE}. Change --block-size (128 is the "
            "default)."
        )


def check_float(name: str, dtype: torch.dtype) -> None:
    """Refuse element types other than float32, float16 and bfloat16.

    Raises:
        ValueError: another type.
    """
    if dtype not in FLOAT_DTYPES:
        raise ValueError(
            f"{name} has dtype {dtype}; allowed are float32, float16 and bfloat16. "
            "Change --dtype or --kv-cache-dtype."
        )


def check_page_dtype(dtype: torch.dtype, quantisation: Quantisation) -> None:
    """Refuse an element type of pages that does not go with what the elements mean.

    Raises:
        ValueError: quantised pages are not int8, or others are no float type.
    """
    if quantisation is Quantisation.NONE:
        check_float("a page without quantisation", dtype)
    elif dtype != torch.int8:
        raise ValueError(
            f"{quantisation.name.lower()} pages hold int8, got {dtype}. Use --kv-cache-dtype "
            "int8_per_token_head."
        )


def check_integer(name: str, tensor: torch.Tensor, dtype: torch.dtype, ndim: int) -> None:
    """Refuse an index tensor of the wrong type, rank or order in memory.

    Raises:
        ValueError: dtype, number of dimensions or innermost stride differ.
    """
    if tensor.dtype != dtype or tensor.dim() != ndim:
        raise ValueError(
            f"{name} must be {ndim}-dimensional {dtype}, got {tensor.dim()}-dimensional "
            f"{tensor.dtype}."
        )
    if not rows_contiguous(tensor):
        raise ValueError(f"{name} must be contiguous in its last dimension; call .contiguous().")


def kind(tensor: torch.Tensor) -> Hashable:
    """Return what the checks of a whole, contiguous tensor depend on."""
    return tensor.dtype, tensor.shape, tensor.is_contiguous()


def rows_contiguous(tensor: torch.Tensor) -> bool:
    """Say whether the elements of a row lie side by side."""
    return tensor.shape[-1] <= 1 or tensor.stride(-1) == 1


def check_tokens(name: str, tensor: torch.Tensor, head_dim: int) -> None:
    """Refuse a ``[tokens, heads, head_dim]`` tensor of the wrong rank, width or order.

    Raises:
        ValueError: rank, head dimension or innermost stride differ.
    """
    if tensor.dim() != 3 or tensor.shape[2] != head_dim:
        raise ValueError(
            f"{name} must be [tokens, heads, {head_dim}] (the page's head dimension), "
            f"got {list(tensor.shape)}."
        )
    if tensor.stride(2) != 1:
        raise ValueError(f"{name} must be contiguous in its last dimension; call .contiguous().")
    check_float(name, tensor.dtype)


def page_layout(layout: Sequence[int]) -> PageLayout:
    """Return the byte map that an operator was given as plain integers.

    Raises:
        ValueError: too few or too many numbers.
    """
    return PageLayout(*as_many(layout, PageLayout._fields, "PageFormat.layout()"))


def plane_layout(layout: Sequence[int]) -> PlaneLayout:
    """Return what an operator of the NPU was told about its pages as plain integers.

    Raises:
        ValueError: too few or too many numbers.
    """
    return PlaneLayout(*as_many(layout, PlaneLayout._fields, "PageFormat.plane_layout()"))


def as_many(numbers: Sequence[int], names: Sequence[str], maker: str) -> Sequence[int]:
    """Return a layout's numbers.

    Args:
        numbers: as an operator was given them.
        names: what each must be.
        maker: what makes such a layout, for the message.

    Raises:
        ValueError: too few or too many numbers.
    """
    if len(numbers) != len(names):
        raise ValueError(
            f"layout has {len(numbers)} numbers, {len(names)} are needed ({', '.join(names)}); "
            f"make it with {maker}."
        )
    return numbers


def check_pages(pages: torch.Tensor, layout: PageLayout) -> None:
    """Refuse pages that do not match their layout.

    Raises:
        ValueError: rank, block size, bytes of a run, offsets or order in memory differ.
    """
    _check_codes(layout)
    check_page_dtype(pages.dtype, Quantisation(layout.quantisation))
    check_block_size(layout.block_size)
    check_head_dim(layout.head_dim)
    if pages.dim() != 4 or pages.shape[2] != layout.block_size:
        raise ValueError(
            f"pages must be [blocks, kv heads, {layout.block_size} (block size), content], got "
            f"{list(pages.shape)}."
        )
    run_bytes = pages.shape[2] * pages.shape[3] * pages.element_size()
    if run_bytes != layout.run_bytes:
        raise ValueError(
            f"a (block, kv head) of pages holds {run_bytes} bytes, its layout says "
            f"{layout.run_bytes}; make both from one PageFormat."
        )
    for name, nbytes, alignment in _arrays(layout, pages.element_size()):
        offset = getattr(layout, name)
        if not 0 <= offset <= run_bytes - nbytes or offset % alignment:
            raise ValueError(
                f"{name} {offset} does not place {nbytes} bytes of whole elements in a "
                f"(block, kv head) of {run_bytes} bytes; make it from a PageFormat."
            )
    if pages.stride(3) != 1 or pages.stride(2) != pages.shape[3]:
        raise ValueError(
            "pages must be contiguous within a (block, kv head), as in vLLM's KV cache layouts "
            f"LBHNC and BLHNC; got strides {pages.stride()}. Unset VLLM_KV_CACHE_LAYOUT."
        )
    if layout.quantisation and (pages.stride(0) % 4 or pages.stride(1) % 4):
        raise ValueError(
            f"int8 pages hold float32 scales, so blocks and kv heads must lie whole multiples of "
            f"4 bytes apart; got strides {pages.stride()}. Pad pages to such a multiple."
        )


def _check_codes(layout: PageLayout) -> None:
    """Refuse a variant, a code of patches or a number of slots that does not exist."""
    known = {int(variant): variant.name.lower() for variant in Quantisation}
    if layout.quantisation not in known:
        raise ValueError(
            f"quantisation {layout.quantisation} is unknown; allowed are {known}. Make the layout "
            "with PageFormat.layout()."
        )
    if layout.quantisation != Quantisation.C8P:
        return
    codes = {int(code): code.name.lower() for code in PatchCode}
    if layout.patch_code not in codes:
        raise ValueError(
            f"patch_code {layout.patch_code} is unknown; allowed are {codes}. Make the layout "
            "with PageFormat.layout()."
        )
    if not 0 < layout.patch_slots <= layout.block_size or layout.patch_slots % 2:
        raise ValueError(
            f"patch_slots {layout.patch_slots} is not supported; allowed are even numbers from 2 "
            f"to the block size ({layout.block_size}). Make the layout with PageFormat.layout()."
        )


def _arrays(layout: PageLayout, itemsize: int) -> list[tuple[str, int, int]]:
    """Return name of the offset, bytes and alignment of each array of a run."""
    columns = padded_head_dim(layout.head_dim, itemsize)
    plane = layout.block_size * columns * itemsize
    found = [("k_offset", plane, itemsize), ("v_offset", plane, itemsize)]
    if layout.quantisation == Quantisation.C8D:
        found += [(f"{name}_scales_offset", layout.block_size * 4, 4) for name in "kv"]
    if layout.quantisation == Quantisation.C8P:
        pool = layout.patch_slots * (2 + 4 + columns // 2)  # tag, scale, codes
        found += [(f"{name}_patches_offset", pool, 4) for name in "kv"]
    return found


def check_channel_scales(
    scales: torch.Tensor | None, quantisation: Quantisation, kv_heads: int, head_dim: int
) -> None:
    """Refuse static scales that are missing, of another shape or not wanted.

    That they are positive and finite is checked where they are loaded.

    Raises:
        ValueError: they do not go with the pages.
    """
    name = quantisation.name.lower()
    if scales is None:
        if quantisation.static:
            raise ValueError(
                f"{name} pages need channel_scales, float32 [2, {kv_heads}, {head_dim}] (K and V, "
                "kv heads, head dimension); give the layer's scales, or use c8d pages, which need "
                "none."
            )
        return
    if not quantisation.static:
        kind = "pages without quantisation" if quantisation is Quantisation.NONE else "c8d pages"
        raise ValueError(
            f"{kind} take no channel_scales; they belong to c8s and c8p pages. Leave them out."
        )
    if scales.dtype != torch.float32 or list(scales.shape) != [2, kv_heads, head_dim]:
        raise ValueError(
            f"channel_scales must be float32 [2, {kv_heads}, {head_dim}] (K and V, kv heads, head "
            f"dimension), got {scales.dtype} {list(scales.shape)}; give the scales of this layer "
            "and tensor-parallel rank."
        )
    if not scales.is_contiguous():
        raise ValueError("channel_scales must be contiguous; call .contiguous().")


def check_fast(fast: bool, quantisation: Quantisation) -> None:
    """Refuse 8-bit products over pages that hold no codes.

    Raises:
        ValueError: fast attention over pages without quantisation.
    """
    if fast and quantisation is Quantisation.NONE:
        raise ValueError(
            "fast=True is for int8 pages; pages without quantisation have one precision. Set "
            "kv_cache.precision to 'exact', or use --kv-cache-dtype int8_per_token_head."
        )


def check_patch_thresholds(thresholds: Sequence[float], quantisation: Quantisation) -> None:
    """Refuse thresholds that are missing, too many or not wanted.

    Raises:
        ValueError: their number does not go with the pages.
    """
    wanted = 2 if quantisation is Quantisation.C8P else 0
    if len(thresholds) == wanted:
        return
    if wanted:
        raise ValueError(
            f"c8p pages need two patch_thresholds, of K and of V, got {list(thresholds)}; give "
            "relative errors, e.g. three times the layer's calibrated mean."
        )
    raise ValueError(
        f"patch_thresholds={list(thresholds)} belong to c8p pages, these are "
        f"{quantisation.name.lower()}; leave them out."
    )


def check_threshold_values(thresholds: Sequence[float]) -> None:
    """Refuse thresholds that are no relative errors.

    Raises:
        ValueError: one is negative or NaN.
    """
    if not all(threshold >= 0 for threshold in thresholds):  # false for NaN
        raise ValueError(
            f"patch_thresholds={list(thresholds)} must not be negative or NaN: they are relative "
            "errors; 0 patches every row that has an error, infinity none."
        )


def check_counters(counters: torch.Tensor | None) -> None:
    """Refuse counters of the wrong type or shape.

    Raises:
        ValueError: not contiguous int64 ``[4]``.
    """
    if counters is None:
        return
    if counters.dtype != torch.int64 or list(counters.shape) != [4]:
        raise ValueError(
            "counters must be int64 [4] (rows written, saturated, patched, patches without a "
            f"slot), got {counters.dtype} {list(counters.shape)}."
        )
    if not counters.is_contiguous():
        raise ValueError("counters must be contiguous; call .contiguous().")
