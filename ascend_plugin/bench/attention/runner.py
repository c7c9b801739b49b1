"""Runs the cases of ``bench attention`` and makes their rows."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from ascend_plugin.bench import machine
from ascend_plugin.bench.attention import parity
from ascend_plugin.bench.attention.cases import Case
from ascend_plugin.bench.attention.contenders import Contender, PluginContender, Prepared
from ascend_plugin.bench.attention.data import CaseData, make_data
from ascend_plugin.bench.attention.rows import AttentionRow
from ascend_plugin.bench.attention.settings import Settings
from ascend_plugin.bench.attention.stock import StockContender
from ascend_plugin.bench.attention.timing import PairedTimes, time_pairs
from ascend_plugin.bench.errors import BenchError
from ascend_plugin.ops import dispatch
from ascend_plugin.ops.native import loader

Report = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a run gives.

    Attributes:
        rows: one per case.
        isa: instruction set of the native kernels that ran; None when none did.
        method: how it was measured, for ``meta``.
    """

    rows: list[AttentionRow]
    isa: str | None
    method: dict[str, object]


def run_cases(cases: Sequence[Case], settings: Settings, report: Report) -> Outcome:
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
    _apply(settings)
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
        "our_cache": f"torch.zeros, then moved to huge pages as the worker does: {memory}",
        "stock_cache": "torch.zeros, as vLLM allocates it",
        "stock_rel_l2_vs_fp64": "null for write: vLLM's layout is its own",
        "ld_preload": os.environ.get("LD_PRELOAD", ""),
    }


def _apply(settings: Settings) -> None:
    """Set threads, implementation and instruction set for this process."""
    torch.set_num_threads(settings.threads)
    torch.manual_seed(0)
    implementation = "native" if settings.isa else settings.implementation
    forced = os.environ.get(dispatch.POLICY_VARIABLE)
    if implementation and forced not in (None, implementation):
        raise BenchError(
            f"{dispatch.POLICY_VARIABLE}={forced} is set and wins over --implementation "
            f"{implementation}. Unset it."
        )
    if implementation:
        dispatch.set_policy(implementation)
    if settings.isa:
        os.environ[loader.ISA_VARIABLE] = settings.isa
    if implementation == "native":
        loader.load()  # says at once why it cannot


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
    else:
        oracle = parity.attention_oracle(data)
        before = parity.check_attention(our_run, oracle)
        stock_parity = parity.check_attention(stock_run, oracle) if stock_run else None
        times = time_pairs(our_run, stock_run, settings.seconds)
        after = oracle.compare(our_run.result)
    ok = before.ok and after.ok
    row = _row(data, our_run, times, settings, ok, before, stock_parity, refusal)
    return row, our_run.remark


def _row(
    data: CaseData,
    our_run: Prepared,
    times: PairedTimes,
    settings: Settings,
    parity_ok: bool,
    our_parity: parity.Parity,
    stock_parity: parity.Parity | None,
    refusal: str | None,
) -> AttentionRow:
    case, geometry = data.case, data.case.geometry
    notes = [refusal] if refusal else []
    if not parity_ok:
        notes.append("parity failed: the time is that of a wrong result")
    if stock_parity and not stock_parity.ok:
        notes.append("vLLM's own result is outside the tolerance too")
    seconds, stock_seconds = times.median, times.stock_median
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
        ratio_vs_stock=_optional(times.ratio if parity_ok else None),
        gb_per_s=_digits(case.moved_bytes / seconds / 1e9),
        gflop_per_s=_optional(case.flop / seconds / 1e9 if case.flop else None),
        rel_l2_vs_fp64=_optional(our_parity.rel_l2),
        stock_rel_l2_vs_fp64=_optional(stock_parity.rel_l2 if stock_parity else None),
        parity_ok=parity_ok,
        pairs=len(times.ours),
        note="; ".join(notes) or None,
    )


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
    needed = case.cache_bytes * (case.layers * contenders + 6) + 2**30
    available = machine.available_memory()
    if available is not None and needed > available:
        raise BenchError(
            f"{case.label} needs about {needed / 2**30:.1f} GiB of memory and "
            f"{available / 2**30:.1f} GiB are available. Lower --batch or --context."
        )
