"""Checks of operator arguments: each failure names the value, what is allowed and the remedy."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from .page_layout import PageLayout, Quantisation

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
    if len(layout) != len(PageLayout._fields):
        raise ValueError(
            f"layout has {len(layout)} numbers, {len(PageLayout._fields)} are needed "
            f"({', '.join(PageLayout._fields)}); make it with PageFormat.layout()."
        )
    return PageLayout(*layout)


def check_pages(pages: torch.Tensor, layout: PageLayout) -> None:
    """Refuse pages that do not match their layout.

    Raises:
        ValueError: rank, block size, bytes of a run, offsets or order in memory differ.
    """
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
    plane_bytes = layout.block_size * layout.head_dim * pages.element_size()
    for name, offset in (("k_offset", layout.k_offset), ("v_offset", layout.v_offset)):
        if not 0 <= offset <= run_bytes - plane_bytes or offset % pages.element_size():
            raise ValueError(
                f"{name} {offset} does not place {plane_bytes} bytes of whole elements in a "
                f"(block, kv head) of {run_bytes} bytes; make it from a PageFormat."
            )
    if pages.stride(3) != 1 or pages.stride(2) != pages.shape[3]:
        raise ValueError(
            "pages must be contiguous within a (block, kv head), as in vLLM's KV cache layouts "
            f"LBHNC and BLHNC; got strides {pages.stride()}. Unset VLLM_KV_CACHE_LAYOUT."
        )
