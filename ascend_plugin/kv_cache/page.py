"""The page: how one block of tokens of one layer lies in memory.

``PageFormat`` is the single source of truth for offsets, strides and bytes. Kernels, references,
capacity accounting, block movers and the documentation take them from here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ascend_plugin.ops import checks
from ascend_plugin.ops.page_layout import PageLayout, column_group


@dataclass(frozen=True, slots=True)
class Plane:
    """One array inside a (block, kv head) run.

    Attributes:
        name: what it holds.
        offset: bytes from the start of the run.
        nbytes: bytes it takes.
        shape: elements, in memory order.
        dtype: element type.
    """

    name: str
    offset: int
    nbytes: int
    shape: tuple[int, ...]
    dtype: torch.dtype


@dataclass(frozen=True, slots=True)
class Region:
    """A range of bytes that belongs to a block, for whatever moves blocks.

    Block ``b`` owns ``nbytes`` bytes at ``offset + b * stride``.
    """

    offset: int
    stride: int
    nbytes: int


@dataclass(frozen=True, slots=True)
class PageFormat:
    """Byte map of a page without quantisation.

    A page holds ``num_kv_heads`` runs, one after the other. A run is ``K | V``, each in NZ order:
    ``(head_dim / C0, block_size, C0)`` with ``C0 = 32 / itemsize``.

    Attributes:
        dtype: element type of K and V: float32, float16 or bfloat16.
        block_size: tokens in a block: a multiple of 16 up to 256.
        num_kv_heads: key/value heads of the layer on this device.
        head_dim: elements of K, and of V, per token and head: a multiple of 16 up to 256.

    Raises:
        ValueError: a value that pages cannot hold; the message says what is allowed.
    """

    dtype: torch.dtype
    block_size: int
    num_kv_heads: int
    head_dim: int

    def __post_init__(self) -> None:
        """Refuse what pages cannot hold."""
        checks.check_float("a page", self.dtype)
        checks.check_block_size(self.block_size)
        checks.check_head_dim(self.head_dim)
        if self.num_kv_heads < 1:
            raise ValueError(f"a page needs at least one kv head, got {self.num_kv_heads}.")

    @property
    def column_group(self) -> int:
        """Elements per NZ column group (C0)."""
        return column_group(self.dtype.itemsize)

    @property
    def planes(self) -> tuple[Plane, ...]:
        """The arrays of a run, in memory order."""
        shape = (self.head_dim // self.column_group, self.block_size, self.column_group)
        nbytes = self.block_size * self.head_dim * self.dtype.itemsize
        return (
            Plane("K", 0, nbytes, shape, self.dtype),
            Plane("V", nbytes, nbytes, shape, self.dtype),
        )

    @property
    def run_bytes(self) -> int:
        """Bytes of one (block, kv head)."""
        return sum(plane.nbytes for plane in self.planes)

    @property
    def token_bytes(self) -> int:
        """Bytes per (kv head, token): vLLM's content size ``C`` of ``[B, H, N, C]``."""
        return self.run_bytes // self.block_size

    @property
    def page_bytes(self) -> int:
        """Bytes of one block in one layer."""
        return self.num_kv_heads * self.run_bytes

    def layout(self) -> PageLayout:
        """Return the byte map in the form operators take."""
        key, value = self.planes
        return PageLayout(
            block_size=self.block_size,
            head_dim=self.head_dim,
            k_offset=key.offset,
            v_offset=value.offset,
            run_bytes=self.run_bytes,
        )

    def pages_shape(self, num_blocks: int) -> tuple[int, int, int, int]:
        """Shape of ``num_blocks`` pages in vLLM's logical order, in elements of ``dtype``."""
        content = self.token_bytes // self.dtype.itemsize
        return (num_blocks, self.num_kv_heads, self.block_size, content)

    def regions(self, num_blocks: int) -> Sequence[Region]:
        """Byte regions of ``num_blocks`` pages that lie one after the other.

        A page is self-contained, so a block is one region: moving it moves everything that its
        attention needs.
        """
        if num_blocks < 0:
            raise ValueError(f"num_blocks={num_blocks} must not be negative.")
        return (Region(offset=0, stride=self.page_bytes, nbytes=self.page_bytes),)
