"""Batches of attention over latents for tests, and an oracle that computes them in float64.

Values are placed by the formulas of ``docs/pages.md``; the oracle knows only those.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from paging import storage

from ascend_plugin.kv_cache import LatentPageFormat
from ascend_plugin.ops.mla_attention import mla_attention
from ascend_plugin.ops.page_layout import Quantisation

#: Ids that no page has: entries of the block table that must not be read.
NO_BLOCK = (-7, 1_000_000)

VARIANTS = {"": Quantisation.NONE, "c8d": Quantisation.C8D, "c8s": Quantisation.C8S}


@dataclass(frozen=True, slots=True)
class LatentCase:
    """What a batch looks like. ``sequences`` holds (query rows, context tokens) pairs."""

    sequences: tuple[tuple[int, int], ...]
    heads: int = 4
    latent_dim: int = 64
    rotary_dim: int = 16
    block_size: int = 16
    dtype: torch.dtype = torch.float32
    page_dtype: torch.dtype | None = None  # None: as dtype
    variant: str = ""  # of int8 pages; page_dtype is not used then
    causal: bool = True
    scale: float | None = None
    interleaved: bool = False  # layers of a block side by side, as in BLHNC
    strided: bool = False
    padding: int = 0
    fast: bool = False
    seed: int = 0

    @property
    def page(self) -> LatentPageFormat:
        dtype = torch.int8 if self.variant else (self.page_dtype or self.dtype)
        shape = (self.block_size, self.latent_dim, self.rotary_dim)
        return LatentPageFormat(dtype, *shape, VARIANTS[self.variant])


@dataclass(slots=True)
class LatentBatch:
    """Tensors of one call, and the values behind its pages."""

    case: LatentCase
    query: torch.Tensor
    query_rotary: torch.Tensor
    pages: torch.Tensor
    out: torch.Tensor
    query_start_loc: torch.Tensor
    seq_lens: torch.Tensor
    block_table: torch.Tensor
    options: dict[str, Any]
    latents: list[torch.Tensor] = field(default_factory=list)
    rotary: list[torch.Tensor] = field(default_factory=list)

    def arguments(self) -> tuple[Any, ...]:
        """Positional arguments of the operator."""
        batch = (self.query_start_loc, self.seq_lens, self.block_table)
        layout = self.case.page.layout()
        return (self.query, self.query_rotary, self.pages, self.out, *batch, layout)

    def run(self) -> torch.Tensor:
        mla_attention(*self.arguments(), **self.options)
        return self.out


def make_pages(page: LatentPageFormat, num_blocks: int, interleaved: bool = False) -> torch.Tensor:
    """Return poisoned pages: NaN in every float, in int8 pages in scales and rotary parts too."""
    _, tokens, content = page.pages_shape(num_blocks)
    shape = (num_blocks, 3, tokens, content) if interleaved else (3, num_blocks, tokens, content)
    # 0xff in every byte is NaN as float32, float16 and bfloat16, and -1 as a code.
    raw = torch.full(shape, -1, dtype=torch.int8).repeat_interleave(page.dtype.itemsize, -1)
    buffer = raw.view(page.dtype)
    return buffer[:, 1] if interleaved else buffer[1]


def positions(
    pages: torch.Tensor, page: LatentPageFormat, name: str, slots: torch.Tensor
) -> torch.Tensor:
    """Return where elements ``(t, d)`` of an array lie, in bytes of the storage of ``pages``."""
    plane = next(plane for plane in page.planes if plane.name == name)
    itemsize = plane.dtype.itemsize
    block, offset = slots // page.block_size, slots % page.block_size
    start = (pages.storage_offset() + block * pages.stride(0)) * pages.element_size() + plane.offset
    if len(plane.shape) == 1:
        return start + offset * itemsize
    c0 = 32 // itemsize
    d = torch.arange(plane.shape[0] * c0)
    in_array = (d // c0) * page.block_size * c0 + offset[:, None] * c0 + d % c0
    return start[:, None] + in_array * itemsize


def put(
    pages: torch.Tensor, page: LatentPageFormat, name: str, slots: torch.Tensor, rows: torch.Tensor
) -> None:
    """Store rows ``[tokens, columns]`` (or scales ``[tokens]``), as they are, at their slots."""
    itemsize = rows.dtype.itemsize
    flat = storage(pages).view(torch.uint8)
    at = positions(pages, page, name, slots)
    if rows.dim() == 2:
        at = at[:, : rows.shape[1]]
    raw = rows.contiguous().view(torch.uint8).unflatten(-1, (-1, itemsize))
    flat[at[..., None] + torch.arange(itemsize)] = (
        raw if rows.dim() == 2 else raw.view(-1, itemsize)
    )


def make_batch(case: LatentCase) -> LatentBatch:
    """Return a random batch: scattered blocks, poisoned wherever no token lies."""
    rng = torch.Generator().manual_seed(case.seed)
    page, size = case.page, case.block_size
    used = [-(-length // size) for _, length in case.sequences]
    num_blocks = sum(used) + 3
    pages = make_pages(page, num_blocks, case.interleaved)
    order = torch.randperm(num_blocks, generator=rng)
    width = max(used, default=0) + 2
    table = torch.full((len(used), width), NO_BLOCK[0], dtype=torch.int32)
    table[:, -1] = NO_BLOCK[1]
    scales = torch.rand(case.latent_dim, generator=rng) * 0.02 + 0.01
    latents, rotary = [], []
    taken = 0
    for i, (_, length) in enumerate(case.sequences):
        blocks = order[taken : taken + used[i]]
        taken += used[i]
        table[i, : used[i]] = blocks.to(torch.int32)
        slots = (blocks[:, None] * size + torch.arange(size)).flatten()[:length]
        stored, meant = _latents(case, length, scales, rng)
        for name, rows in stored.items():
            put(pages, page, name, slots, rows)
        turned = torch.randn(length, case.rotary_dim, generator=rng).to(page.rotary_dtype)
        put(pages, page, "rotary parts", slots, turned)
        latents.append(meant)
        rotary.append(turned.double())
    counts = [rows for rows, _ in case.sequences]
    tokens = sum(counts) + case.padding
    query = _rows(case, tokens, case.latent_dim, rng)
    query_rotary = _rows(case, tokens, case.rotary_dim, rng)
    out = _rows(case, tokens, case.latent_dim, rng).fill_(7.0)
    starts = torch.tensor([0, *torch.tensor(counts).cumsum(0).tolist()], dtype=torch.int32)
    lengths = torch.tensor([length for _, length in case.sequences], dtype=torch.int32)
    scale = (case.latent_dim + case.rotary_dim) ** -0.5 if case.scale is None else case.scale
    options = {"scale": scale, "causal": case.causal, "fast": case.fast}
    if case.variant == "c8s":
        options["channel_scales"] = scales
    batch = (starts, lengths, table)
    return LatentBatch(
        case, query, query_rotary, pages, out, *batch, options, latents=latents, rotary=rotary
    )


def _latents(
    case: LatentCase, length: int, scales: torch.Tensor, rng: torch.Generator
) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """Return what pages hold for so many tokens, and the values that it means."""
    if not case.variant:
        rows = torch.randn(length, case.latent_dim, generator=rng).to(case.page.dtype)
        return {"latents": rows}, rows.double()
    codes = torch.randint(-127, 128, (length, case.latent_dim), generator=rng, dtype=torch.int8)
    if case.variant == "c8s":
        return {"latents": codes}, codes.double() * scales.double()
    of_tokens = torch.rand(length, generator=rng) * 0.02 + 0.01
    return {"latents": codes, "scales": of_tokens}, codes.double() * of_tokens.double()[:, None]


def _rows(case: LatentCase, tokens: int, width: int, rng: torch.Generator) -> torch.Tensor:
    if not case.strided:
        return torch.randn(tokens, case.heads, width, generator=rng).to(case.dtype)
    wide = torch.randn(tokens, case.heads + 1, width + 16, generator=rng).to(case.dtype)
    return wide[:, 1:, 16:]


def oracle(batch: LatentBatch) -> torch.Tensor:
    """Return what the batch's rows must become, float64."""
    case = batch.case
    out = torch.full(batch.out.shape, 7.0, dtype=torch.float64)
    start = 0
    for i, (count, length) in enumerate(case.sequences):
        for j in range(count):
            row, position = start + j, length - count + j
            seen = min(length, position + 1) if case.causal else length
            if seen <= 0:
                out[row] = 0.0
                continue
            latent, rotary = batch.latents[i][:seen], batch.rotary[i][:seen]
            scores = batch.query[row].double() @ latent.T
            scores += batch.query_rotary[row].double() @ rotary.T
            out[row] = torch.softmax(scores * batch.options["scale"], -1) @ latent
        start += count
    return out


#: Allowed error of a batch, relative to its norm. float32: rounding. Others: the query and weights
#: rounded to 8 bits of mantissa, as every bfloat16 kernel does; fast: to 8-bit integers.
TOLERANCE = {torch.float32: 3e-6, torch.float16: 1e-3, torch.bfloat16: 6e-3}
FAST_TOLERANCE = 2e-2


def tolerance(case: LatentCase) -> float:
    if case.fast:
        return FAST_TOLERANCE
    if case.variant:
        return max(TOLERANCE[case.dtype], 1e-4 if case.dtype == torch.float32 else 0.0)
    return max(TOLERANCE[case.dtype], TOLERANCE[case.page.dtype])


def assert_close(batch: LatentBatch, want: torch.Tensor | None = None) -> None:
    """Compare ``out`` with the oracle, and rows outside the batch with what they were."""
    want = oracle(batch) if want is None else want
    inside = int(batch.query_start_loc[-1])
    assert bool((batch.out[inside:] == 7.0).all()), "a padding row was written"
    got, want = batch.out[:inside].double(), want[:inside]
    assert torch.equal(got.isnan(), want.isnan())
    off = float((got - want).nan_to_num(0.0).norm() / want.nan_to_num(0.0).norm().clamp(min=1e-30))
    allowed = tolerance(batch.case)
    assert off <= allowed, f"relative error {off:.2e} of {batch.case}, {allowed:.0e} is allowed"
