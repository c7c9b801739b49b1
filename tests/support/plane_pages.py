"""Pages arranged by planes for tests of NPU kernels: made from pages of runs, and taken apart."""

from __future__ import annotations

import functools
import itertools
from dataclasses import dataclass

import torch

from ascend_plugin.kv_cache import PageFormat
from ascend_plugin.ops import nz
from ascend_plugin.ops.kv_cache_write import kv_cache_write
from ascend_plugin.ops.page_layout import Arrangement, PatchCode, Quantisation
from ascend_plugin.ops.paged_attention import paged_attention

#: Rows above it are patched; about a third of those of :meth:`Shape.rows`.
THRESHOLD = 0.01

#: name: quantisation, code of patches.
VARIANTS = {
    "c8d": (Quantisation.C8D, PatchCode.INT4),
    "c8s": (Quantisation.C8S, PatchCode.INT4),
    "c8p-int4": (Quantisation.C8P, PatchCode.INT4),
    "c8p-e3m0": (Quantisation.C8P, PatchCode.E3M0),
    "none": (Quantisation.NONE, PatchCode.INT4),
}


@dataclass(frozen=True)
class Shape:
    """Pages of one layer.

    Attributes:
        variant: a name in ``VARIANTS``.
        kv_heads: kv heads.
        head_dim: elements of a head.
        block_size: tokens in a block.
        dtype: of rows, and of pages without quantisation.
    """

    variant: str
    kv_heads: int = 2
    head_dim: int = 128
    block_size: int = 128
    dtype: torch.dtype = torch.bfloat16

    @property
    def quantisation(self) -> Quantisation:
        return VARIANTS[self.variant][0]

    def page(self, arrangement: Arrangement) -> PageFormat:
        quantisation, code = VARIANTS[self.variant]
        dtype = self.dtype if quantisation is Quantisation.NONE else torch.int8
        shape = (self.block_size, self.kv_heads, self.head_dim)
        return PageFormat(dtype, *shape, quantisation, code, arrangement)

    @property
    def runs(self) -> PageFormat:
        return self.page(Arrangement.RUN_MAJOR)

    @property
    def planes(self) -> PageFormat:
        return self.page(Arrangement.PLANE_MAJOR)

    @functools.cached_property
    def scales(self) -> torch.Tensor | None:
        """Static scales, exact in bfloat16, in which C8S scales are read on an NPU."""
        if not self.quantisation.static:
            return None
        generator = torch.Generator().manual_seed(9)
        shape = (2, self.kv_heads, self.head_dim)
        scales = 0.02 + 0.02 * torch.rand(shape, generator=generator)
        return scales.to(torch.bfloat16).float()

    @property
    def thresholds(self) -> list[float]:
        return [THRESHOLD, THRESHOLD] if self.quantisation is Quantisation.C8P else []

    def rows(self, tokens: int, seed: int = 0) -> torch.Tensor:
        """Draw fused projections, ``[tokens, 1 + 2 * kv_heads, head_dim]``: something, K, V."""
        generator = torch.Generator().manual_seed(seed)
        shape = (tokens, 1 + 2 * self.kv_heads, self.head_dim)
        rows = torch.randn(shape, generator=generator)
        rows[torch.rand(shape[:2], generator=generator) < 0.15] *= 8
        return rows.to(self.dtype)

    def split(self, rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return K and V of fused projections, as views."""
        return rows[:, 1 : 1 + self.kv_heads], rows[:, 1 + self.kv_heads :]


def reference_pages(
    shape: Shape, blocks: int, rows: torch.Tensor, slots: torch.Tensor, counters: torch.Tensor
) -> torch.Tensor:
    """Return pages of runs as the CPU's operator writes them."""
    pages = torch.zeros(shape.runs.pages_shape(blocks), dtype=shape.runs.dtype)
    _write(shape, pages, rows, slots, counters, shape.runs.layout())
    return pages


def _write(shape, pages, rows, slots, counters, layout) -> None:
    key, value = shape.split(rows)
    kv_cache_write(
        key,
        value,
        pages,
        slots,
        layout,
        channel_scales=shape.scales,
        patch_thresholds=shape.thresholds,
        counters=counters,
    )


def device_pages(
    shape: Shape,
    blocks: int,
    rows: torch.Tensor,
    slots: torch.Tensor,
    device: torch.device,
    counters: torch.Tensor | None = None,
) -> torch.Tensor:
    """Return pages of planes as the NPU's operator writes them."""
    pages = torch.zeros(shape.planes.pages_shape(blocks), dtype=shape.planes.dtype).to(device)
    layout = shape.planes.plane_layout()
    _write(shape, pages, rows.to(device), slots.to(device), counters, layout)
    return pages


def arrays_of_runs(shape: Shape, pages: torch.Tensor) -> dict[str, torch.Tensor]:
    """Return what pages of runs hold, ``[blocks, kv_heads, ...]`` each."""
    layout = shape.runs.layout()
    found = dict(zip("KV", nz.page_planes(pages, layout), strict=True))
    if shape.quantisation is Quantisation.C8D:
        for name, scales in zip("KV", nz.page_scales(pages, layout), strict=True):
            found[f"{name} scales"] = scales
    if shape.quantisation is Quantisation.C8P:
        for name, pool in zip("KV", nz.page_patches(pages, layout), strict=True):
            found |= {f"{name} {field}": each for field, each in pool._asdict().items()}
    return found


def arrays_of_planes(shape: Shape, pages: torch.Tensor) -> dict[str, torch.Tensor]:
    """Return what pages of planes hold, as :func:`arrays_of_runs` does.

    Byte by byte, as docs/pages.md draws it: the package's own views are not used.
    """
    page, heads, size = shape.planes, shape.kv_heads, shape.block_size
    blocks = pages.shape[0]
    raw = pages.cpu().contiguous().view(-1).view(torch.uint8)
    itemsize = page.dtype.itemsize
    plane = heads * size * page.padded_head_dim * itemsize
    codes = raw[: 2 * blocks * plane].view(page.dtype)
    fractals = codes.view(blocks, 2, heads, -1, size, 32 // itemsize)
    found = {"K": fractals[:, 0], "V": fractals[:, 1]}
    extras = raw[2 * blocks * plane :].view(blocks, 2, heads, -1)
    for i, name in enumerate("KV"):
        mine = extras[:, i]
        if shape.quantisation is Quantisation.C8D:
            found[f"{name} scales"] = mine.contiguous().view(torch.float32)
        if shape.quantisation is Quantisation.C8P:
            slots, half = size // 8, page.padded_head_dim // 2
            ends = [0, 2 * slots, 6 * slots, 6 * slots + slots * half]
            tags, scales, patches = (
                mine[..., start:stop].contiguous() for start, stop in itertools.pairwise(ends)
            )
            found[f"{name} tags"] = tags.view(torch.int16)
            found[f"{name} scales"] = scales.view(torch.float32)
            found[f"{name} codes"] = patches.unflatten(-1, (slots, half))
    return found


def reference_attention(
    shape: Shape,
    pages: torch.Tensor,
    query: torch.Tensor,
    rows: list[int],
    lengths: list[int],
    table: torch.Tensor,
    window: int = 0,
) -> torch.Tensor:
    """Return the attention of the CPU's operator over pages of runs, float32."""
    query = query.float()
    out = torch.zeros_like(query)
    paged_attention(
        query,
        pages,
        out,
        torch.tensor([0, *rows]).cumsum(0).to(torch.int32),
        torch.tensor(lengths, dtype=torch.int32),
        table,
        shape.runs.layout(),
        scale=shape.head_dim**-0.5,
        window=window,
        channel_scales=shape.scales,
    )
    return out
