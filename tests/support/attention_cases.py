"""Attention batches for tests, and an oracle that computes them row by row in float64."""

from __future__ import annotations

from copy import deepcopy
from dataclasses import dataclass, field, replace
from functools import cache, lru_cache
from typing import Any

import int8_pages
import paging
import torch
from int8_pages import Int8

from ascend_plugin.kv_cache import PageFormat
from ascend_plugin.ops.kv_cache_write.reference import kv_cache_write
from ascend_plugin.ops.paged_attention import paged_attention

#: Ids that no page has: entries of the block table that must not be read.
NO_BLOCK = (-7, 1_000_000)


@dataclass(frozen=True, slots=True)
class Case:
    """What a batch looks like. ``sequences`` holds (query rows, context tokens) pairs."""

    sequences: tuple[tuple[int, int], ...]
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 64
    block_size: int = 16
    dtype: torch.dtype = torch.float32
    page_dtype: torch.dtype | None = None  # None: as dtype
    scale: float | None = None  # None: head_dim ** -0.5
    causal: bool = True
    window: int = 0
    soft_cap: float = 0.0
    alibi: bool = False
    sinks: bool = False
    order: str = "LBHNC"
    strided: bool = False
    padding: int = 0
    seed: int = 0
    variant: str = ""  # a kind of int8 page; page_dtype is not used then
    fast: bool = False

    @property
    def page(self) -> PageFormat:
        if self.variant:
            shape = (self.block_size, self.kv_heads, self.head_dim)
            return int8_pages.page_format(self.variant, *shape)
        dtype = self.page_dtype or self.dtype
        return PageFormat(dtype, self.block_size, self.kv_heads, self.head_dim)

    def first_token(self, rows: int, length: int) -> int:
        """First token of a sequence that any of its rows sees."""
        return max(0, length - rows - self.window + 1) if self.window else 0


@dataclass(slots=True)
class Batch:
    """Tensors of one call, and the keys and values behind its pages."""

    case: Case
    query: torch.Tensor
    pages: torch.Tensor
    out: torch.Tensor
    query_start_loc: torch.Tensor
    seq_lens: torch.Tensor
    block_table: torch.Tensor
    options: dict[str, Any]
    keys: list[torch.Tensor] = field(default_factory=list)
    values: list[torch.Tensor] = field(default_factory=list)

    def arguments(self) -> tuple[Any, ...]:
        """Positional arguments of the operator."""
        batch = (self.query_start_loc, self.seq_lens, self.block_table)
        return (self.query, self.pages, self.out, *batch, self.case.page.layout())

    def run(self) -> torch.Tensor:
        """Call the operator; its output."""
        paged_attention(*self.arguments(), **self.options)
        return self.out


def make_batch(case: Case) -> Batch:
    """Draw a batch; every element of the pages that no row may see is NaN, or poisoned codes."""
    if not case.variant:
        return _draw(case)
    # Int8 pages take long to write and read in Python: they are drawn once for all implementations.
    batch = deepcopy(_drawn(replace(case, fast=False)))
    batch.case, batch.options["fast"] = case, case.fast
    return batch


@lru_cache(256)
def _drawn(case: Case) -> Batch:
    return _draw(case)


def _draw(case: Case) -> Batch:
    generator = torch.Generator().manual_seed(case.seed)
    rows = sum(count for count, _ in case.sequences)
    widest = max((-(-length // case.block_size) for _, length in case.sequences), default=0)
    table = torch.tensor(NO_BLOCK, dtype=torch.int32).repeat(len(case.sequences), widest)
    table = table[:, : widest + 1].contiguous()
    needed = sum(-(-length // case.block_size) for _, length in case.sequences)
    make_pages = int8_pages.make_pages if case.variant else paging.make_pages
    pages = make_pages(case.page, needed + 2, case.order)
    free = (torch.randperm(needed + 1, generator=generator) + 1).tolist()  # block 0 stays NaN
    query = _tokens(rows + case.padding, case.heads, case, generator)
    batch = Batch(
        case,
        query,
        pages,
        _like(query, case.strided),
        torch.tensor([0, *(count for count, _ in case.sequences)]).cumsum(0).to(torch.int32),
        torch.tensor([length for _, length in case.sequences], dtype=torch.int32),
        table,
        _options(case, generator),
    )
    for i, (count, length) in enumerate(case.sequences):
        _add_sequence(batch, i, count, length, free, generator)
    return batch


def _add_sequence(
    batch: Batch, i: int, count: int, length: int, free: list[int], generator: torch.Generator
) -> None:
    case = batch.case
    if case.variant:
        key, value = Int8(case.page).rows(length, generator)
    else:
        shape = (length, case.kv_heads, case.head_dim)
        key, value = (torch.randn(shape, generator=generator).to(batch.pages.dtype) for _ in "kv")
    batch.keys.append(key)
    batch.values.append(value)
    first = case.first_token(count, length)
    if count == 0 or first >= length:
        return
    for column in range(first // case.block_size, -(-length // case.block_size)):
        batch.block_table[i, column] = free.pop()
    tokens = torch.arange(first, length)
    blocks = batch.block_table[i, tokens // case.block_size].long()
    slots = blocks * case.block_size + tokens % case.block_size
    if not case.variant:
        paging.put(batch.pages, case.page, slots, key[first:], value[first:])
        return
    # The oracle attends to what the pages mean: quantisation is no error of attention.
    int8, layout = Int8(case.page), case.page.layout()
    options = int8.write_options()
    kv_cache_write(key[first:], value[first:], batch.pages, slots, layout, **options)
    meant = int8_pages.read(batch.pages, int8, slots)
    for planes, plane in zip((batch.keys, batch.values), meant, strict=True):
        planes[i] = torch.full((length, *plane.shape[1:]), float("nan"), dtype=torch.float64)
        planes[i][first:] = plane


def _tokens(count: int, heads: int, case: Case, generator: torch.Generator) -> torch.Tensor:
    if not case.strided:
        return torch.randn((count, heads, case.head_dim), generator=generator).to(case.dtype)
    # As after a fused QKV projection: a slice of wider rows.
    wide = torch.randn((count, heads + 3, case.head_dim), generator=generator).to(case.dtype)
    return wide[:, 1 : heads + 1]


def _like(query: torch.Tensor, strided: bool) -> torch.Tensor:
    tokens, heads, head_dim = query.shape
    extra = 2 if strided else 0
    return torch.full((tokens, heads + extra, head_dim), 7.0, dtype=query.dtype)[:, extra:]


def _options(case: Case, generator: torch.Generator) -> dict[str, Any]:
    slopes = 2.0 ** -torch.arange(1, case.heads + 1, dtype=torch.float32)
    quantised = {"channel_scales": Int8(case.page).channel_scales()} if case.variant else {}
    return quantised | {
        "scale": case.head_dim**-0.5 if case.scale is None else case.scale,
        "causal": case.causal,
        "window": case.window,
        "soft_cap": case.soft_cap,
        "alibi_slopes": slopes if case.alibi else None,
        "sinks": torch.randn(case.heads, generator=generator) if case.sinks else None,
    }


def oracle(batch: Batch) -> torch.Tensor:
    """Compute a batch row by row in float64; rows outside the batch are NaN."""
    want = torch.full(batch.query.shape, float("nan"), dtype=torch.float64)
    for i, (count, length) in enumerate(batch.case.sequences):
        start = int(batch.query_start_loc[i])
        for j in range(count):
            position = length - count + j
            want[start + j] = _row(batch, i, batch.query[start + j].double(), position, length)
    return want


def _row(batch: Batch, i: int, query: torch.Tensor, position: int, length: int) -> torch.Tensor:
    """Attend one row, ``[heads, head_dim]``, by the operator's documentation."""
    case, options = batch.case, batch.options
    stop = min(length, position + 1) if case.causal else length
    start = 0
    if case.window:
        start = max(0, position - case.window + 1)
        stop = min(stop, position + case.window)
    if stop <= start:
        return torch.zeros_like(query)
    group = case.heads // case.kv_heads
    key = batch.keys[i][start:stop].double().repeat_interleave(group, 1)
    value = batch.values[i][start:stop].double().repeat_interleave(group, 1)
    s = (query * key).sum(-1) * options["scale"]  # [tokens, heads]
    if case.soft_cap:
        s = case.soft_cap * torch.tanh(s / case.soft_cap)
    if case.alibi:
        distance = torch.arange(start, stop, dtype=torch.float64) - position
        s = s + distance[:, None] * options["alibi_slopes"].double()
    weight = s.exp()
    total = weight.sum(0)
    if case.sinks:
        total = total + options["sinks"].double().exp()
    return (weight[..., None] * value).sum(0) / total[:, None]


#: Absolute and relative error that an implementation may have, by the narrowest type in a call.
#: Kernels may round weights to the page's type before they multiply with V.
TOLERANCE = {
    torch.float32: (2e-5, 2e-5),
    torch.float16: (2e-3, 2e-3),
    torch.bfloat16: (1.6e-2, 1.6e-2),
}


def expected(case: Case) -> torch.Tensor:
    """Return what the oracle says of a case, computed once for all implementations."""
    return _expected(replace(case, fast=False))


@cache
def _expected(case: Case) -> torch.Tensor:
    return oracle(make_batch(case))


#: Everything that changes how scores are made, alone.
SCORE_OPTIONS = (
    {"window": 1},
    {"window": 16},
    {"window": 63},
    {"window": 10_000},
    {"soft_cap": 0.7},
    {"alibi": True},
    {"sinks": True},
    {"causal": False},
    {"causal": False, "window": 9},
    {"scale": 0.5},
)


def int8_tolerance(case: Case) -> float:
    """Relative error that attention over int8 pages may have, beyond the quantisation's."""
    if case.fast:
        return 2e-2
    # bfloat16 products of many rows (prefill) round queries, weights and outputs: 2.2e-3 without
    # int8, up to 3.4e-3 seen with static scales folded into the query. Quantisation costs 9e-3.
    return 2e-4 if case.dtype == torch.float32 else 4e-3


def relative_error(got: torch.Tensor, want: torch.Tensor) -> float:
    """Return the norm of the difference, relative to what is wanted; NaN must be where it is."""
    assert torch.equal(got.isnan(), want.isnan())
    difference = (got.double() - want.double()).nan_to_num(0.0).norm()
    return float(difference / want.double().nan_to_num(0.0).norm().clamp(min=1e-30))


def assert_close(
    batch: Batch, want: torch.Tensor | None = None, tolerance: tuple[float, float] | None = None
) -> None:
    """Compare ``out`` with the oracle, and rows outside the batch with what they were.

    Args:
        batch: a batch that ran.
        want: what its case's oracle does not know, if the batch was changed.
        tolerance: absolute and relative, if not :data:`TOLERANCE`.
    """
    case = batch.case
    want = expected(case) if want is None else want
    inside = int(batch.query_start_loc[-1])
    assert bool((batch.out[inside:] == 7.0).all()), "a padding row was written"
    if case.variant:
        allowed = tolerance[1] if tolerance else int8_tolerance(case)
        off = relative_error(batch.out[:inside], want[:inside])
        assert off <= allowed, f"relative error {off:.2e} of {case}, {allowed:.0e} is allowed"
        return
    atol, rtol = tolerance or max(TOLERANCE[case.dtype], TOLERANCE[case.page.dtype])
    torch.testing.assert_close(
        batch.out[:inside].double(), want[:inside].double(), atol=atol, rtol=rtol
    )
