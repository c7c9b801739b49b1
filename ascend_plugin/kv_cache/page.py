"""The page: how one block of tokens of one layer lies in memory.

``PageFormat`` is the single source of truth for offsets, strides and bytes. Kernels, references,
capacity accounting, block movers and the documentation take them from here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import gcd, prod

import torch

from ascend_plugin.ops import checks
from ascend_plugin.ops.page_layout import (
    TOKENS_PER_PATCH_SLOT,
    Arrangement,
    PageLayout,
    PatchCode,
    PlaneLayout,
    Quantisation,
    column_group,
    padded_head_dim,
    patch_pool_bytes,
)


@dataclass(frozen=True, slots=True)
class Plane:
    """One array inside a (block, kv head) run, or inside a region of a block.

    Attributes:
        name: what it holds.
        offset: bytes from the start of the run; in the arrangement ``PLANE_MAJOR`` from the start
            of the block's part of the region.
        nbytes: bytes it takes.
        shape: elements, in memory order.
        dtype: element type.
        region: which of :meth:`PageFormat.regions` it lies in.
    """

    name: str
    offset: int
    nbytes: int
    shape: tuple[int, ...]
    dtype: torch.dtype
    region: int = 0


@dataclass(frozen=True, slots=True)
class Region:
    """A range of bytes that belongs to a block, for whatever moves blocks.

    Block ``b`` owns ``nbytes`` bytes at ``offset + b * stride``.
    """

    offset: int
    stride: int
    nbytes: int


#: Runs start on cache lines.
_RUN_ALIGNMENT = 64


@dataclass(frozen=True, slots=True)
class PageFormat:
    """Byte map of a page.

    A page holds ``num_kv_heads`` runs, one after the other. A run is ``K | V | extras``. K and V
    are in NZ order, ``(padded_head_dim / C0, block_size, C0)`` with ``C0 = 32 / itemsize``. The
    extras make an int8 page self-contained: scales (C8D) or patches (C8P) of its tokens; none
    without quantisation and with C8S. Zeros may follow, so that a run has as many bytes for every
    token and starts on a cache line.

    In the arrangement ``PLANE_MAJOR`` a page is K of all kv heads, then V of all kv heads. The
    extras are a region of their own behind the pages of all blocks, so that K, V and the scales of
    both are arrays in which block ``b`` has the index ``2 * b``: the NPU's fused attention finds
    all four through one block table.

    Attributes:
        dtype: element type of K and V: float32, float16 or bfloat16, int8 if quantised.
        block_size: tokens in a block: a multiple of 16 up to 256.
        num_kv_heads: key/value heads of the layer on this device.
        head_dim: elements of K, and of V, per token and head: a multiple of 16 up to 256.
        quantisation: what the elements mean.
        patch_code: how C8P codes residuals.
        arrangement: the order of the arrays in memory.

    Raises:
        ValueError: a value that pages cannot hold; the message says what is allowed.
    """

    dtype: torch.dtype
    block_size: int
    num_kv_heads: int
    head_dim: int
    quantisation: Quantisation = Quantisation.NONE
    patch_code: PatchCode = PatchCode.INT4
    arrangement: Arrangement = Arrangement.RUN_MAJOR

    def __post_init__(self) -> None:
        """Refuse what pages cannot hold."""
        checks.check_page_dtype(self.dtype, self.quantisation)
        checks.check_block_size(self.block_size)
        checks.check_head_dim(self.head_dim)
        if self.num_kv_heads < 1:
            raise ValueError(f"a page needs at least one kv head, got {self.num_kv_heads}.")

    @property
    def _by_planes(self) -> bool:
        return self.arrangement is Arrangement.PLANE_MAJOR

    @property
    def column_group(self) -> int:
        """Elements per NZ column group (C0)."""
        return column_group(self.dtype.itemsize)

    @property
    def padded_head_dim(self) -> int:
        """Columns of K, and of V, in the page: ``head_dim`` in whole column groups."""
        return padded_head_dim(self.head_dim, self.dtype.itemsize)

    @property
    def patch_slots(self) -> int:
        """Slots of each pool of patches; 0 without."""
        if self.quantisation is not Quantisation.C8P:
            return 0
        return self.block_size // TOKENS_PER_PATCH_SLOT

    @property
    def planes(self) -> tuple[Plane, ...]:
        """The arrays of a run, or of a block if arranged by planes, in memory order."""
        if self._by_planes:
            return self._block_planes()
        columns, size, slots = self.padded_head_dim, self.block_size, self.patch_slots
        fractals = (columns // self.column_group, size, self.column_group)
        arrays: list[tuple[str, tuple[int, ...], torch.dtype]] = [
            ("K", fractals, self.dtype),
            ("V", fractals, self.dtype),
        ]
        if self.quantisation is Quantisation.C8D:
            arrays += [(f"{name} scales", (size,), torch.float32) for name in "KV"]
        if self.quantisation is Quantisation.C8P:
            for name in "KV":
                arrays += [
                    (f"{name} patch tags", (slots,), torch.int16),
                    (f"{name} patch scales", (slots,), torch.float32),
                    (f"{name} patch codes", (slots, columns // 2), torch.uint8),
                ]
        planes, offset = [], 0
        for name, shape, dtype in arrays:
            plane = Plane(name, offset, prod(shape) * dtype.itemsize, shape, dtype)
            planes.append(plane)
            offset += plane.nbytes
        return tuple(planes)

    def _block_planes(self) -> tuple[Plane, ...]:
        heads, size, columns = self.num_kv_heads, self.block_size, self.padded_head_dim
        fractals = (heads, columns // self.column_group, size, self.column_group)
        arrays: list[tuple[str, tuple[int, ...], torch.dtype, int]] = [
            ("", fractals, self.dtype, 0)
        ]
        if self.quantisation is Quantisation.C8D:
            arrays.append((" scales", (heads, size), torch.float32, 1))
        if self.quantisation is Quantisation.C8P:
            pool = patch_pool_bytes(self.patch_slots, columns)
            arrays.append((" patches", (heads, pool), torch.uint8, 1))
        planes = []
        for suffix, shape, dtype, region in arrays:
            nbytes = prod(shape) * dtype.itemsize
            planes += [
                Plane(f"{name}{suffix}", i * nbytes, nbytes, shape, dtype, region)
                for i, name in enumerate("KV")
            ]
        return tuple(planes)

    def plane(self, name: str) -> Plane:
        """Return the array of a run that has this name.

        Raises:
            KeyError: this page has none of that name.
        """
        for plane in self.planes:
            if plane.name == name:
                return plane
        raise KeyError(name)

    @property
    def token_bytes(self) -> int:
        """Bytes per (kv head, token): vLLM's content size ``C`` of ``[B, H, N, C]``."""
        used = sum(plane.nbytes for plane in self.planes)
        if self._by_planes:
            return used // (self.block_size * self.num_kv_heads)
        per_token = -(-used // self.block_size)
        step = _RUN_ALIGNMENT // gcd(_RUN_ALIGNMENT, self.block_size)
        return -(-per_token // step) * step

    @property
    def run_bytes(self) -> int:
        """Bytes of one (block, kv head)."""
        return self.token_bytes * self.block_size

    @property
    def page_bytes(self) -> int:
        """Bytes of one block in one layer."""
        return self.num_kv_heads * self.run_bytes

    def plane_layout(self) -> PlaneLayout:
        """Return the form in which operators of the NPU take this format.

        Raises:
            ValueError: the pages are not arranged by planes.
        """
        if not self._by_planes:
            raise ValueError("pages of the arrangement RUN_MAJOR have no planes; use layout().")
        return PlaneLayout(
            block_size=self.block_size,
            head_dim=self.head_dim,
            num_kv_heads=self.num_kv_heads,
            quantisation=int(self.quantisation),
            patch_code=int(self.patch_code) if self.patch_slots else 0,
            patch_slots=self.patch_slots,
        )

    def layout(self) -> PageLayout:
        """Return the byte map in the form operators take.

        Raises:
            ValueError: the pages are arranged by planes, and have no runs.
        """
        if self._by_planes:
            raise ValueError(
                "pages of the arrangement PLANE_MAJOR have no runs; use plane_layout()."
            )
        at = {plane.name: plane.offset for plane in self.planes}
        return PageLayout(
            block_size=self.block_size,
            head_dim=self.head_dim,
            k_offset=at["K"],
            v_offset=at["V"],
            run_bytes=self.run_bytes,
            quantisation=int(self.quantisation),
            k_scales_offset=at.get("K scales", 0),
            v_scales_offset=at.get("V scales", 0),
            patch_code=int(self.patch_code) if self.patch_slots else 0,
            patch_slots=self.patch_slots,
            k_patches_offset=at.get("K patch tags", 0),
            v_patches_offset=at.get("V patch tags", 0),
        )

    def pages_shape(self, num_blocks: int) -> tuple[int, int, int, int]:
        """Shape of ``num_blocks`` pages in vLLM's logical order, in elements of ``dtype``."""
        content = self.token_bytes // self.dtype.itemsize
        return (num_blocks, self.num_kv_heads, self.block_size, content)

    def regions(self, num_blocks: int) -> Sequence[Region]:
        """Byte regions of ``num_blocks`` pages that lie one after the other.

        Moving all regions of a block moves everything that its attention needs. There is one, or
        two where int8 pages with scales or patches are arranged by planes.

        Raises:
            ValueError: ``num_blocks`` is negative.
        """
        if num_blocks < 0:
            raise ValueError(f"num_blocks={num_blocks} must not be negative.")
        if not self._by_planes:
            return (Region(offset=0, stride=self.page_bytes, nbytes=self.page_bytes),)
        found: list[Region] = []
        offset = 0
        for region in sorted({plane.region for plane in self.planes}):
            nbytes = sum(plane.nbytes for plane in self.planes if plane.region == region)
            found.append(Region(offset, nbytes, nbytes))
            offset += nbytes * num_blocks
        return tuple(found)
