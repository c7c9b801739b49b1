"""NZ order in plain torch: the meaning of the layout that kernels read and write.

NZ of an (n, d) matrix is (d / C0, n, C0): columns are cut into groups of C0 elements (32 bytes)
and the rows of one group lie one after the other. The NPU's cube unit reads fractals of 16 such
rows. Source: CANN's FRACTAL_NZ format (``aclFormat`` 29).
"""

from __future__ import annotations

import torch

from .page_layout import PageLayout, column_group


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
        Two views ``[num_blocks, num_kv_heads, head_dim / C0, block_size, C0]``.
    """
    itemsize = pages.element_size()
    c0 = column_group(itemsize)
    shape = (pages.shape[0], pages.shape[1], layout.head_dim // c0, layout.block_size, c0)
    strides = (pages.stride(0), pages.stride(1), layout.block_size * c0, c0, 1)

    def plane(offset_bytes: int) -> torch.Tensor:
        offset = pages.storage_offset() + offset_bytes // itemsize
        return pages.as_strided(shape, strides, offset)

    return plane(layout.k_offset), plane(layout.v_offset)
