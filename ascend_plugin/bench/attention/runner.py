"""Runs the cases of ``bench attention`` and makes their rows."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from ascend_plugin.bench import machine
from ascend_plugin.bench.attention import parity
from ascend_plugin.bench.attention.cases import Case
from ascend_plugin.bench.attention.contenders import Contender, PluginContender, plain_reader
from ascend_plugin.bench.attention.data import QUIET_SHARE, CaseData, make_data, unquantised
from ascend_plugin.bench.attention.rows import AttentionRow
from ascend_plugin.bench.attention.stock import StockContender
from ascend_plugin.bench.errors import BenchError
from ascend_plugin.bench.outcome import Outcome
from ascend_plugin.bench.runtime import apply_settings
from ascend_plugin.bench.settings import Settings
from ascend_plugin.bench.timing import PairedTimes, Prepared, time_pairs
from ascend_plugin.kv_cache import PageFormat
from ascend_plugin.worker.cpu_steps import MAX_TOKENS

Report = Callable[[str], None]


def run_cases(cases: Sequence[Case], settings: Settings, report: Report) -> Outcome[AttentionRow]:
    """Measure every case.

    Args:
        cases: what to measure.
        settings: how.
        report: called with a line before each step.

    Raises:
        BenchError: a case does not fit into memory, or pages cannot hold it.
        NativeLibraryError: the asked instruction set does not run here.
        ValueError: another policy is forced by the environment.
    """
    apply_settings(settings)
    report("loading vLLM's operators")
    ours, stock = PluginContender(), StockContender()
    rows, memory = [], set()
    with torch.no_grad():
        for number, case in enumerate(cases, start=1):
            report(f"{number}/{len(cases)} {case.label}")
            row, remark = _run_case(case, ours, stock, settings)
            rows.append(row)
            memory.add(remark)
    isa = next((row.isa for row in rows if row.isa), None)
    return Outcome(rows, isa, _method(settings, sorted(memory)))


def _method(settings: Settings, memory: list[str]) -> dict[str, object]:
    return {
        "seconds_per_case": settings.seconds,
        "interleaving": "call by call, A B then B A, each pair on the next layer's caches",
        "ratio_vs_stock": "median over pairs of stock time / our time",
        "our_call": f"decode and write of up to {MAX_TOKENS} rows: repeated from a recorded step, "
        "as the engine does, if it is native; else the operator. vLLM's: its operator, from Python",
        "our_cache": f"torch.zeros, then moved to huge pages as the worker does: {memory}",
        "stock_cache": "torch.zeros, as vLLM allocates it; not quantised",
        "int8_data": f"{QUIET_SHARE:.0%} of (token, head) rows are ten times smaller than the rest",
        "rel_l2_vs_pages": "against float64 over what the pages hold; parity_ok judges this one",
        "read_gb_per_s": "int64 maximum over another layer's pages, in the same turns",
        "gb_per_s": "K and V alone, without scales and patches",
        "stock_rel_l2_vs_fp64": "null for write: vLLM's layout is its own",
        "ld_preload": os.environ.get("LD_PRELOAD", ""),
    }


def _run_case(
    case: Case, ours: Contender, stock: Contender, settings: Settings
) -> tuple[AttentionRow, str]:
    refusal = stock.refusal(case)
    _require_memory(case, contenders=1 if refusal else 2)
    data = make_data(case)
    our_run = ours.prepare(data)
    stock_run = None if refusal else stock.prepare(data)
    if case.phase == "write":
        before, stock_parity = parity.check_write(our_run, data), None
        times = time_pairs(our_run, stock_run, settings.seconds)
        after = parity.compare_pages(our_run, data)
        truth = before
    else:
        oracle = parity.attention_oracle(data)
        exact = (
            oracle if case.quantisation == "none" else parity.attention_oracle(unquantised(data))
        )
        before = parity.check_attention(our_run, oracle)
        truth = exact.compare(our_run.result)
        stock_parity = parity.check_attention(stock_run, exact) if stock_run else None
        reader = plain_reader(our_run) if case.phase == "decode" else None
        times = time_pairs(our_run, stock_run, settings.seconds, reader)
        after = oracle.compare(our_run.result)
    checked = Checked(before.ok and after.ok, before.rel_l2, truth.rel_l2, stock_parity)
    return _row(data, our_run, times, settings, checked, refusal), our_run.remark


@dataclass(frozen=True, slots=True)
class Checked:
    """What the comparisons of a case found.

    Attributes:
        ok: the plugin computed what its pages say, before and after the clock ran.
        page_rel_l2: its error against that.
        rel_l2: its error against keys and values as they were before any page.
        stock: the same of vLLM.
    """

    ok: bool
    page_rel_l2: float | None
    rel_l2: float | None
    stock: parity.Parity | None


def _row(
    data: CaseData,
    our_run: Prepared,
    times: PairedTimes,
    settings: Settings,
    checked: Checked,
    refusal: str | None,
) -> AttentionRow:
    case, geometry = data.case, data.case.geometry
    notes = [refusal] if refusal else []
    if not checked.ok:
        notes.append("parity failed: the time is that of a wrong result")
    if checked.stock and not checked.stock.ok:
        notes.append("vLLM's own result is outside the tolerance too")
    seconds, stock_seconds, read_seconds = times.median, times.stock_median, times.read_median
    page_bytes = data.pages.numel() * data.pages.element_size()
    return AttentionRow(
        phase=case.phase,
        variant=case.variant,
        implementation=our_run.implementation,
        isa=our_run.isa,
        batch=case.batch,
        context=case.context,
        new_tokens=case.new_tokens,
        heads=geometry.heads,
        kv_heads=geometry.kv_heads,
        head_dim=geometry.head_dim,
        block_size=geometry.block_size,
        threads=settings.threads,
        time_ms=_digits(seconds * 1e3),
        stock_time_ms=None if stock_seconds is None else _digits(stock_seconds * 1e3),
        best_ms=_digits(min(times.ours) * 1e3),
        stock_best_ms=_digits(min(times.stock) * 1e3) if times.stock else None,
        ratio_vs_stock=_optional(times.ratio if checked.ok else None),
        gb_per_s=_digits(case.moved_bytes / seconds / 1e9),
        read_gb_per_s=_optional(page_bytes / read_seconds / 1e9 if read_seconds else None),
        gflop_per_s=_optional(case.flop / seconds / 1e9 if case.flop else None),
        rel_l2_vs_fp64=_optional(checked.rel_l2),
        rel_l2_vs_pages=_optional(checked.page_rel_l2),
        stock_rel_l2_vs_fp64=_optional(checked.stock.rel_l2 if checked.stock else None),
        parity_ok=checked.ok,
        kv_tokens_per_gib=_tokens_per_gib(data.page),
        kv_tokens_vs_bf16=_digits(_bf16_page(data.page).page_bytes / data.page.page_bytes),
        pairs=len(times.ours),
        note="; ".join(notes) or None,
    )


def _bf16_page(page: PageFormat) -> PageFormat:
    return PageFormat(torch.bfloat16, page.block_size, page.num_kv_heads, page.head_dim)


def _tokens_per_gib(page: PageFormat) -> int:
    """Tokens of one layer that a GiB of pages holds."""
    return 2**30 // page.page_bytes * page.block_size


def _digits(value: float) -> float:
    """Round to four significant digits: more would be noise."""
    return float(f"{value:.4g}")


def _optional(value: float | None) -> float | None:
    return None if value is None else _digits(value)


def _require_memory(case: Case, contenders: int) -> None:
    """Refuse a case before the machine starts to swap.

    Raises:
        BenchError: the caches and the inputs need more than is available.
    """
    caches = case.cache_bytes + case.stock_cache_bytes * (contenders - 1)
    needed = caches * case.layers + case.stock_cache_bytes * 6 + 2**30
    available = machine.available_memory()
    if available is not None and needed > available:
        raise BenchError(
            f"{case.label} needs about {needed / 2**30:.1f} GiB of memory and "
            f"{available / 2**30:.1f} GiB are available. Lower --batch or --context."
        )
