"""The page of latents (MLA): how one block of tokens of one layer lies in memory.

``LatentPageFormat`` is for multi-head latent attention what ``PageFormat`` is for K and V: the
single source of truth for offsets, strides and bytes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

import torch

from ascend_plugin.ops import checks, latent
from ascend_plugin.ops.page_layout import (
    Arrangement,
    LatentLayout,
    LatentPlaneLayout,
    Quantisation,
    column_group,
    padded_head_dim,
)

from .page import Plane, Region


@dataclass(frozen=True, slots=True)
class LatentPageFormat:
    """Byte map of a page of latents.

    A page is ``latents | rotary parts | scales``, for all query heads of a layer. Latents and
    rotary parts are in NZ order, ``(dim / C0, block_size, C0)`` with ``C0 = 32 / itemsize``. They
    have one type, or the latents are int8 and the rotary parts bfloat16; C8D adds a float32 scale
    per token. Blocks hold multiples of 16 tokens, so every page is whole cache lines, and no byte
    is padding (but of latent dimensions that 32 does not divide, in int8).

    In the arrangement ``PLANE_MAJOR`` each array is a region of its own: the latents of all blocks,
    then the rotary parts of all blocks, then the scales. The NPU's fused attention wants latents
    and rotary parts contiguous and finds both through one block table, and no view of whole pages
    is both: the latents of a page are eight times as large as its rotary parts (512 and 64).

    Attributes:
        dtype: element type of the latents: float32, float16 or bfloat16, int8 if quantised.
        block_size: tokens in a block: a multiple of 16 up to 256.
        latent_dim: ``kv_lora_rank``: a multiple of 16 up to 512.
        rotary_dim: ``qk_rope_head_dim``: a multiple of 16 up to 128.
        quantisation: what the elements mean: none, C8D or C8S.
        arrangement: the order of the arrays in memory.

    Raises:
        ValueError: a value that pages cannot hold; the message says what is allowed.
    """

    dtype: torch.dtype
    block_size: int
    latent_dim: int
    rotary_dim: int
    quantisation: Quantisation = Quantisation.NONE
    arrangement: Arrangement = Arrangement.RUN_MAJOR

    def __post_init__(self) -> None:
        """Refuse what pages cannot hold."""
        latent.check_quantisation(self.quantisation)
        checks.check_page_dtype(self.dtype, self.quantisation)
        checks.check_block_size(self.block_size)
        latent.check_dims(self.latent_dim, self.rotary_dim)

    @property
    def _by_planes(self) -> bool:
        return self.arrangement is Arrangement.PLANE_MAJOR

    @property
    def rotary_dtype(self) -> torch.dtype:
        """Element type of the rotary parts."""
        return latent.rotary_dtype(self.dtype)

    @property
    def padded_latent_dim(self) -> int:
        """Columns of latents in the page: ``latent_dim`` in whole column groups."""
        return padded_head_dim(self.latent_dim, self.dtype.itemsize)

    @property
    def planes(self) -> tuple[Plane, ...]:
        """The arrays of a page, in memory order; if arranged by planes, each in its region."""
        size = self.block_size
        arrays: list[tuple[str, tuple[int, ...], torch.dtype]] = []
        for name, columns, dtype in (
            ("latents", self.padded_latent_dim, self.dtype),
            ("rotary parts", self.rotary_dim, self.rotary_dtype),
        ):
            group = column_group(dtype.itemsize)
            arrays.append((name, (columns // group, size, group), dtype))
        if self.quantisation is Quantisation.C8D:
            arrays.append(("scales", (size,), torch.float32))
        planes, offset = [], 0
        for i, (name, shape, dtype) in enumerate(arrays):
            place = (0, i) if self._by_planes else (offset, 0)
            nbytes = prod(shape) * dtype.itemsize
            planes.append(Plane(name, place[0], nbytes, shape, dtype, place[1]))
            offset += nbytes
        return tuple(planes)

    @property
    def token_bytes(self) -> int:
        """Bytes per token: vLLM's content size ``C`` of ``[B, 1, N, C]``."""
        return self.page_bytes // self.block_size

    @property
    def page_bytes(self) -> int:
        """Bytes of one block in one layer."""
        return sum(plane.nbytes for plane in self.planes)

    def plane_layout(self) -> LatentPlaneLayout:
        """Return the form in which operators of the NPU take this format.

        Raises:
            ValueError: the pages are not arranged by planes.
        """
        if not self._by_planes:
            raise ValueError("pages of the arrangement RUN_MAJOR have no planes; use layout().")
        return LatentPlaneLayout(
            self.block_size, self.latent_dim, self.rotary_dim, int(self.quantisation)
        )

    def layout(self) -> LatentLayout:
        """Return the byte map in the form operators take.

        Raises:
            ValueError: the pages are arranged by planes: a block is in several pieces.
        """
        if self._by_planes:
            raise ValueError(
                "a block of the arrangement PLANE_MAJOR is in several pieces; use plane_layout()."
            )
        at = {plane.name: plane.offset for plane in self.planes}
        return LatentLayout(
            block_size=self.block_size,
            latent_dim=self.latent_dim,
            rotary_dim=self.rotary_dim,
            rotary_offset=at["rotary parts"],
            scales_offset=at.get("scales", 0),
            page_bytes=self.page_bytes,
            quantisation=int(self.quantisation),
        )

    def pages_shape(self, num_blocks: int) -> tuple[int, int, int]:
        """Shape of ``num_blocks`` pages in vLLM's logical order, in elements of ``dtype``."""
        return (num_blocks, self.block_size, self.token_bytes // self.dtype.itemsize)

    def regions(self, num_blocks: int) -> Sequence[Region]:
        """Byte regions of ``num_blocks`` pages that lie one after the other.

        There is one, or one per array if arranged by planes.

        Raises:
            ValueError: ``num_blocks`` is negative.
        """
        if num_blocks < 0:
            raise ValueError(f"num_blocks={num_blocks} must not be negative.")
        if not self._by_planes:
            return (Region(offset=0, stride=self.page_bytes, nbytes=self.page_bytes),)
        found, offset = [], 0
        for plane in self.planes:
            found.append(Region(offset, plane.nbytes, plane.nbytes))
            offset += plane.nbytes * num_blocks
        return tuple(found)
