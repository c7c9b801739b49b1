"""Pages by planes for tests of AscendC kernels, and the same pages by runs for the operators.

Kernels work on planes and what lies behind them; the reference works on runs. Tests fill both with
the same poison, let each do its work, and compare every byte.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import NamedTuple

import int8_pages
import paging
import torch
from int8_pages import Int8

from ascend_plugin.kv_cache import PageFormat
from ascend_plugin.ops.ascendc import host
from ascend_plugin.ops.nz import page_patches, page_planes, page_scales
from ascend_plugin.ops.page_layout import PatchCode, Quantisation, patch_pool_bytes

#: What kernels are tested with: entry names end with these.
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}

#: Variants of int8 pages, by the names of tests/support/int8_pages.py, to those of the entries.
ENTRIES = {"c8d": "c8d", "c8s": "c8s", "c8p-int4": "c8p", "c8p-e3m0": "c8p"}

BLOCKS = 4


def few_schedules() -> list[host.Schedule]:
    """Return few schedules, for tests of arithmetic: 3, or 16 of the full set's 64."""
    every = host.schedules()
    return every[: max(3, len(every) // 4)]


def memory(view: torch.Tensor) -> torch.Tensor:
    """Return what lies in memory from a view's first element on, flat, as kernels are given it."""
    left = view.untyped_storage().nbytes() // view.element_size() - view.storage_offset()
    return view.as_strided((left,), (1,))


class Planes(NamedTuple):
    """Memory of a layer's pages as kernels see it, each tensor a buffer with its own bounds.

    Attributes:
        codes: ``[blocks, 2 (K, V), kv_heads, head_dim / C0, block_size, C0]``.
        extras: c8d: scales, float32 ``[blocks, 2, kv_heads, block_size]``; c8p: pools, uint8
            ``[blocks, 2, kv_heads, bytes]``; None otherwise.
    """

    codes: torch.Tensor
    extras: torch.Tensor | None

    def clone(self) -> Planes:
        """Return a copy in memory of its own."""
        return Planes(self.codes.clone(), None if self.extras is None else self.extras.clone())

    def must_equal(self, want: Planes) -> None:
        """Fail unless every byte is the same."""
        same_bytes(self.codes, want.codes)
        same_bytes(self.extras, want.extras)


@dataclass(frozen=True, slots=True)
class Layer:
    """A layer's pages, and what kernels are told about them.

    Attributes:
        variant: ``none`` or a variant of int8 pages.
        dtype: ``bf16`` or ``fp16``.
        kv_heads: of the layer.
        head_dim: elements per row.
        block_size: tokens per block.
        blocks: pages.
        threshold: of patches, for K and V.
    """

    variant: str = "c8d"
    dtype: str = "bf16"
    kv_heads: int = 3
    head_dim: int = 64
    block_size: int = 16
    blocks: int = BLOCKS
    threshold: float = int8_pages.THRESHOLD

    @property
    def entry(self) -> str:
        """End of the entry's name."""
        return f"{ENTRIES.get(self.variant, 'none')}_{self.dtype}"

    @property
    def page(self) -> PageFormat:
        """Format of the pages, by runs."""
        shape = (self.block_size, self.kv_heads, self.head_dim)
        if self.variant == "none":
            return PageFormat(DTYPES[self.dtype], *shape)
        return int8_pages.page_format(self.variant, *shape)

    @property
    def int8(self) -> Int8:
        """What the operators need besides pages."""
        return replace(Int8(self.page), thresholds=(self.threshold, self.threshold))

    @property
    def channel_scales(self) -> torch.Tensor | None:
        """Static scales, float32 ``[2, kv_heads, head_dim]``, or None."""
        return None if self.variant == "none" else self.int8.channel_scales()

    @property
    def patch_code(self) -> int:
        """The number that kernels are told."""
        return int(self.page.patch_code is PatchCode.E3M0)

    def make_runs(self, seed: int = 0) -> torch.Tensor:
        """Return poisoned pages by runs."""
        if self.variant != "none":
            return int8_pages.make_pages(self.page, self.blocks, seed=seed).clone()
        generator = torch.Generator().manual_seed(seed)
        pages = torch.empty(self.page.pages_shape(self.blocks), dtype=self.page.dtype)
        bits = torch.randint(-(2**15), 2**15, pages.shape, generator=generator)
        pages.view(torch.int16).copy_(bits)
        return pages

    def to_planes(self, runs: torch.Tensor) -> Planes:
        """Return pages by planes that hold what ``runs`` hold; zeros of pools are poison."""
        layout = self.page.layout()
        codes = torch.stack(page_planes(runs, layout), 1).contiguous()
        quantisation = self.page.quantisation
        if quantisation is Quantisation.C8D:
            return Planes(codes, torch.stack(page_scales(runs, layout), 1).contiguous())
        if quantisation is not Quantisation.C8P:
            return Planes(codes, None)
        pools = [
            torch.cat([part.contiguous().view(torch.uint8).flatten(2) for part in pool], -1)
            for pool in page_patches(runs, layout)
        ]
        extras = torch.stack(pools, 1)
        nbytes = patch_pool_bytes(layout.patch_slots, self.page.padded_head_dim)
        rest = torch.full((*extras.shape[:-1], nbytes - extras.shape[-1]), 0xA5, dtype=torch.uint8)
        return Planes(codes, torch.cat([extras, rest], -1))

    def rows(self, tokens: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
        """Draw K and V, ``[tokens, kv_heads, head_dim]``; every fifth row is an outlier."""
        generator = torch.Generator().manual_seed(seed)
        plain = Layer("c8s", self.dtype, self.kv_heads, self.head_dim, self.block_size)
        key, value = plain.int8.rows(tokens, generator)
        return key.to(DTYPES[self.dtype]), value.to(DTYPES[self.dtype])

    def slots(self, tokens: int, seed: int = 0, skipped: int = 0) -> torch.Tensor:
        """Draw ascending runs of slots in shuffled blocks, as a batch of sequences has them."""
        generator = torch.Generator().manual_seed(seed)
        order = torch.randperm(self.blocks, generator=generator)
        slots = (order[:, None] * self.block_size + torch.arange(self.block_size)).flatten()
        slots = slots.roll(-seed % self.block_size)[:tokens].clone()
        slots[torch.randperm(tokens, generator=generator)[:skipped]] = -1
        return slots


def fused(key: torch.Tensor, value: torch.Tensor, query_heads: int = 2) -> list[torch.Tensor]:
    """Return key and value as views of a fused projection, behind ``query_heads`` heads."""
    query = torch.full((key.shape[0], query_heads, key.shape[2]), torch.nan, dtype=key.dtype)
    whole = torch.cat([query, key, value], 1)
    return list(whole[:, query_heads:].chunk(2, 1))


def same_bytes(got: torch.Tensor | None, want: torch.Tensor | None) -> None:
    """Fail unless all elements have equal bits; one NaN is as good as another."""
    if got is None or want is None:
        assert got is want
        return
    different = paging.bits(got) != paging.bits(want)
    if got.is_floating_point():
        different &= ~(got.isnan() & want.isnan())
    where = different.nonzero()[:8].tolist()
    assert not different.any(), f"{int(different.sum())} elements differ: {where}"
