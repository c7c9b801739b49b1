"""Runs the cases of ``bench mla``: contenders in turn, each result against float64."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from ascend_plugin.bench.errors import BenchError
from ascend_plugin.bench.mla.cases import MlaCase, MlaRow
from ascend_plugin.bench.mla.stock import StockMla
from ascend_plugin.bench.outcome import Outcome
from ascend_plugin.bench.parity import FAST_TOLERANCE, TOLERANCES
from ascend_plugin.bench.runtime import DTYPES, apply_settings
from ascend_plugin.bench.settings import Settings
from ascend_plugin.bench.timing import Prepared, time_pairs
from ascend_plugin.kv_cache import LatentPageFormat
from ascend_plugin.ops import mla_attention as attention_op
from ascend_plugin.ops.mla_attention import reference
from ascend_plugin.ops.mla_cache_write import mla_cache_write
from ascend_plugin.ops.native import loader, memory
from ascend_plugin.ops.page_layout import Quantisation


@dataclass(frozen=True)
class MlaData:
    """Inputs of one case.

    Attributes:
        case: what they are for.
        page: format of the plugin's pages.
        query: ``[tokens, heads, latent_dim]``, absorbed.
        query_rotary: ``[tokens, heads, rotary_dim]``.
        latents: ``[batch * context, latent_dim]``; channels differ in size, as those behind a
            learned norm do.
        rotary: ``[batch * context, rotary_dim]``.
        pages: latents and rotary parts in pages.
        block_table: int32 ``[batch, blocks]``, random.
        channel_scales: float32 ``[latent_dim]`` of c8s, else None.
    """

    case: MlaCase
    page: LatentPageFormat
    query: torch.Tensor
    query_rotary: torch.Tensor
    latents: torch.Tensor
    rotary: torch.Tensor
    pages: torch.Tensor
    block_table: torch.Tensor
    channel_scales: torch.Tensor | None

    @property
    def scale(self) -> float:
        """Factor of the scores: that of heads of 128 + rotary_dim, as in DeepSeek."""
        return float((128 + self.case.rotary_dim) ** -0.5)

    def batch(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return query_start_loc, seq_lens and block_table."""
        case = self.case
        starts = torch.arange(case.batch + 1, dtype=torch.int32) * case.new_tokens
        lengths = torch.full((case.batch,), case.context, dtype=torch.int32)
        return starts.to(torch.int32), lengths, self.block_table


def make_data(case: MlaCase) -> MlaData:
    """Draw the contents of a case; the same case gives the same bytes.

    Raises:
        BenchError: sizes that pages cannot hold.
    """
    rng = torch.Generator().manual_seed(0)
    dtype = DTYPES[case.element]
    rows, tokens = case.batch * case.new_tokens, case.batch * case.context
    sizes = torch.rand(case.latent_dim, generator=rng) + 0.5
    latents = (torch.randn(tokens, case.latent_dim, generator=rng) * sizes).to(dtype)
    rotary = torch.randn(tokens, case.rotary_dim, generator=rng).to(dtype)
    query = (torch.randn(rows, case.heads, case.latent_dim, generator=rng) * 0.5).to(dtype)
    # As in the engine: a slice of the projection of all parts of the query.
    projected = torch.randn(rows, case.heads, 128 + case.rotary_dim, generator=rng).to(dtype)
    blocks = torch.randperm(
        case.batch * case.blocks_per_sequence, generator=rng, dtype=torch.int32
    ).view(case.batch, -1)
    static = case.variant.startswith("c8s")
    scales = latents.float().abs().amax(0) / 127 if static else None
    page = _page_format(case, Quantisation.C8S if static else None)
    data = MlaData(
        case=case,
        page=page,
        query=query,
        query_rotary=projected[..., 128:],
        latents=latents,
        rotary=rotary,
        pages=torch.zeros(page.pages_shape(blocks.numel()), dtype=page.dtype),
        block_table=blocks,
        channel_scales=scales,
    )
    _fill(data)
    return data


def _page_format(case: MlaCase, quantisation: Quantisation | None) -> LatentPageFormat:
    if quantisation is None and case.variant.startswith("c8d"):
        quantisation = Quantisation.C8D
    dtype = DTYPES[case.element] if quantisation is None else torch.int8
    kind = quantisation or Quantisation.NONE
    try:
        return LatentPageFormat(dtype, case.block_size, case.latent_dim, case.rotary_dim, kind)
    except ValueError as error:
        raise BenchError(f"pages cannot hold this case: {error}") from error


def slots(block_table: torch.Tensor, block_size: int, context: int) -> torch.Tensor:
    """Return the slots of all tokens, sequence after sequence, int64."""
    of_blocks = block_table.long()[..., None] * block_size + torch.arange(block_size)
    return of_blocks.flatten(1)[:, :context].flatten()


def _fill(data: MlaData) -> None:
    mla_cache_write(
        data.latents,
        data.rotary,
        data.pages,
        slots(data.block_table, data.case.block_size, data.case.context),
        data.page.layout(),
        channel_scales=data.channel_scales,
    )


def _expected(data: MlaData) -> torch.Tensor:
    """Return the attention over what the pages hold, in float64."""
    out = torch.empty(data.query.shape, dtype=torch.float64)
    reference.mla_attention(
        data.query,
        data.query_rotary,
        data.pages,
        out,
        *data.batch(),
        data.page.layout(),
        scale=data.scale,
        causal=True,
        channel_scales=data.channel_scales,
        compute_dtype=torch.float64,
    )
    return out


def _unquantised(data: MlaData) -> MlaData:
    """Return the same tokens in pages of their own type: the truth for int8 pages."""
    page = _page_format(replace(data.case, variant=data.case.element), None)
    pages = torch.zeros(page.pages_shape(data.pages.shape[0]), dtype=page.dtype)
    plain = replace(data, page=page, pages=pages, channel_scales=None)
    _fill(plain)
    return plain


def prepare(data: MlaData) -> Prepared:
    """Return the plugin's operator over one copy of the pages per layer, on huge pages."""
    layout, batch = data.page.layout(), data.batch()
    fast = data.case.variant.endswith("-fast")
    caches = []
    for _ in range(data.case.layers(data.pages.nbytes)):
        cache = torch.zeros_like(data.pages)
        memory.back_zeroed_with_huge_pages(cache)
        caches.append(cache.copy_(data.pages))
    result = torch.empty_like(data.query)

    def run(layer: int) -> None:
        attention_op.mla_attention(
            data.query,
            data.query_rotary,
            caches[layer],
            result,
            *batch,
            layout,
            scale=data.scale,
            channel_scales=data.channel_scales,
            fast=fast,
        )

    request = attention_op.LatentAttentionRequest(
        data.query.dtype,
        data.page.dtype,
        data.case.heads,
        data.page.latent_dim,
        data.page.rotary_dim,
        data.page.block_size,
        data.page.quantisation,
    )
    chosen = attention_op.operator.choose(request).implementation.name
    isa = loader.load().isa if chosen == "native" else None
    return Prepared(run, len(caches), result, tuple(caches), implementation=chosen, isa=isa)


def run_cases(
    cases: Sequence[MlaCase], settings: Settings, report: Callable[[str], None]
) -> Outcome[MlaRow]:
    """Measure every case.

    Args:
        cases: what to measure.
        settings: how.
        report: called with a line before each case.

    Raises:
        BenchError: pages cannot hold a case.
    """
    apply_settings(settings)
    stock = StockMla()
    rows = []
    with torch.no_grad():
        for number, case in enumerate(cases, start=1):
            report(f"{number}/{len(cases)} {case.label}")
            rows.append(_run_case(case, stock, settings))
    method: dict[str, object] = {
        "seconds_per_case": settings.seconds,
        "interleaving": "call by call, A B then B A, each pair on the next layer's caches",
        "ratio_vs_stock": "median over pairs of stock time / our time",
        "rel_l2_vs_pages": "against float64 over what the pages hold; parity_ok judges this one",
        "stock": "torch.ops._C.mla_decode_kvcache, blocks of 16, not quantised",
    }
    isa = next((row.isa for row in rows if row.isa), None)
    return Outcome(rows, isa, method)


def _error(result: torch.Tensor, expected: torch.Tensor) -> float | None:
    error = float((result.double() - expected).norm() / expected.norm())
    return error if math.isfinite(error) else None


def _checked(run: Prepared, expected: torch.Tensor) -> float | None:
    run.result.fill_(math.nan)
    run.run(0)
    return _error(run.result, expected)


def _run_case(case: MlaCase, stock: StockMla, settings: Settings) -> MlaRow:
    data = make_data(case)
    refusal = stock.refusal(case)
    ours = prepare(data)
    theirs = None if refusal else stock.prepare(data)
    held = _expected(data)
    truth = held if data.page.quantisation is Quantisation.NONE else _expected(_unquantised(data))
    limit = FAST_TOLERANCE if case.variant.endswith("-fast") else TOLERANCES[case.element]
    before = _checked(ours, held)
    stock_error = _checked(theirs, truth) if theirs else None
    times = time_pairs(ours, theirs, settings.seconds)
    after = _error(ours.result, held)
    ok = all(error is not None and error <= limit for error in (before, after))
    notes = [refusal] if refusal else []
    if not ok:
        notes.append("parity failed: the time is that of a wrong result")
    numbers: dict[str, Any] = {
        "time_ms": times.median * 1e3,
        "stock_time_ms": times.stock_median and times.stock_median * 1e3,
        "best_ms": min(times.ours) * 1e3,
        "stock_best_ms": min(times.stock) * 1e3 if times.stock else None,
        "ratio_vs_stock": times.ratio if ok else None,
        "gflop_per_s": case.flop / times.median / 1e9,
        "stock_gflop_per_s": times.stock_median and case.flop / times.stock_median / 1e9,
        "gb_per_s": case.batch * case.context * data.page.token_bytes / times.median / 1e9,
        "rel_l2_vs_fp64": _error(ours.result, truth),
        "rel_l2_vs_pages": before,
        "stock_rel_l2_vs_fp64": stock_error,
    }
    shape = ("variant", "batch", "context", "new_tokens", "heads")
    rounded: dict[str, Any] = {
        name: None if x is None else float(f"{x:.4g}") for name, x in numbers.items()
    }
    return MlaRow(
        **{
            name: getattr(case, name) for name in (*shape, "latent_dim", "rotary_dim", "block_size")
        },
        **rounded,
        implementation=ours.implementation,
        isa=ours.isa,
        threads=settings.threads,
        parity_ok=ok,
        bytes_per_token=data.page.token_bytes,
        pairs=len(times.ours),
        note="; ".join(notes) or None,
    )
