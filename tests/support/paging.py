"""Pages for tests: made in every memory order, addressed by the formula of the documentation.

Nothing here uses the operators or ``ops.nz``: it is what they are compared with.
"""

from __future__ import annotations

import torch

from ascend_plugin.kv_cache import PageFormat

#: Memory orders of pages: vLLM's two, and one with the heads outermost.
ORDERS = ("LBHNC", "BLHNC", "HBNC")


def make_pages(
    page: PageFormat, num_blocks: int, order: str = "LBHNC", fill: float = float("nan")
) -> torch.Tensor:
    """Return pages ``[blocks, kv_heads, block_size, content]`` in a larger, filled buffer."""
    _, heads, tokens, content = page.pages_shape(num_blocks)
    if order == "LBHNC":  # the second of three layers
        buffer = torch.full((3, num_blocks, heads, tokens, content), fill, dtype=page.dtype)
        return buffer[1]
    if order == "BLHNC":
        buffer = torch.full((num_blocks, 3, heads, tokens, content), fill, dtype=page.dtype)
        return buffer[:, 1]
    buffer = torch.full((heads, num_blocks, tokens, content), fill, dtype=page.dtype)
    return buffer.transpose(0, 1)


def storage(tensor: torch.Tensor) -> torch.Tensor:
    """Return everything that a view's memory holds, flat."""
    flat = torch.empty(0, dtype=tensor.dtype)
    return flat.set_(tensor.untyped_storage())


def bits(tensor: torch.Tensor) -> torch.Tensor:
    """Return a copy of a tensor's bytes as integers, so that NaN equals NaN."""
    integers = {1: torch.int8, 2: torch.int16, 4: torch.int32}[tensor.element_size()]
    return tensor.contiguous().view(integers).clone()


def element_index(
    pages: torch.Tensor, page: PageFormat, plane: str, slots: torch.Tensor
) -> torch.Tensor:
    """Return where elements ``(t, h, d)`` of K or V lie in the storage of ``pages``.

    Args:
        pages: as the operators take them.
        page: their format.
        plane: ``K`` or ``V``.
        slots: ``[tokens]``, all inside the pages.

    Returns:
        Indices ``[tokens, kv_heads, head_dim]`` into :func:`storage`.
    """
    c0 = 32 // page.dtype.itemsize
    block, offset = slots // page.block_size, slots % page.block_size
    d = torch.arange(page.head_dim)
    heads = torch.arange(page.num_kv_heads) * pages.stride(1)
    in_plane = (d // c0) * page.block_size * c0 + offset[:, None] * c0 + d % c0
    start = pages.storage_offset()
    if plane == "V":
        start += page.block_size * page.padded_head_dim
    return start + (block * pages.stride(0))[:, None, None] + heads[:, None] + in_plane[:, None]


def put(
    pages: torch.Tensor,
    page: PageFormat,
    slots: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
) -> None:
    """Store tokens ``[tokens, kv_heads, head_dim]`` at their slots."""
    flat = storage(pages)
    flat[element_index(pages, page, "K", slots)] = key.to(pages.dtype)
    flat[element_index(pages, page, "V", slots)] = value.to(pages.dtype)
