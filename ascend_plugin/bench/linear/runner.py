"""Runs the cases of ``bench linear`` and makes their rows."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch

from ascend_plugin.bench import machine
from ascend_plugin.bench.errors import BenchError
from ascend_plugin.bench.linear import contenders, data
from ascend_plugin.bench.linear.cases import LinearCase
from ascend_plugin.bench.linear.rows import LinearRow
from ascend_plugin.bench.linear.stock import StockContender
from ascend_plugin.bench.outcome import Outcome
from ascend_plugin.bench.parity import Parity
from ascend_plugin.bench.runtime import apply_settings
from ascend_plugin.bench.settings import Settings
from ascend_plugin.bench.timing import Prepared, time_turns

Report = Callable[[str], None]
Times = Mapping[str, tuple[float, ...]]


def run_cases(
    cases: Sequence[LinearCase], settings: Settings, report: Report
) -> Outcome[LinearRow]:
    """Measure every case.

    Args:
        cases: what to measure.
        settings: how.
        report: called with a line before each step.

    Raises:
        BenchError: a case does not fit into memory.
        NativeLibraryError: the asked instruction set does not run here.
    """
    apply_settings(settings)
    report("loading vLLM's operators")
    stock = StockContender()
    rows = []
    with torch.no_grad():
        for number, case in enumerate(cases, start=1):
            report(f"{number}/{len(cases)} {case.label}")
            rows.append(_run_case(case, stock, settings))
    isa = next((row.isa for row in rows if row.isa), None)
    return Outcome(rows, isa, _method(settings))


def _method(settings: Settings) -> dict[str, object]:
    return {
        "seconds_per_case": settings.seconds,
        "interleaving": "call by call, in turns of changing order, each on the next layer's weight",
        "ratios": "median over turns of the other's time / our time",
        "ours": "as the engine calls it: repeated from recorded steps where those have so many "
        "rows, weights on huge pages",
        "bf16": "torch.nn.functional.linear (oneDNN), weights as they lie in a checkpoint",
        "vllm_bf16": "vLLM's onednn_mm, weights re-ordered at load",
        "stock": "vLLM's cpu_gemm_wna16 (w4a16), dynamic quantisation and oneDNN int8 (w8a8)",
        "rel_l2": "against float64 with the same integers and scales",
    }


def _run_case(case: LinearCase, stock: StockContender, settings: Settings) -> LinearRow:
    refusal = stock.refusal(case)
    _require_memory(case)
    tensors = data.make_data(case)
    oracle = data.oracle(tensors)
    present = {"ours": contenders.plugin(tensors), "bf16": contenders.bf16(tensors)}
    if not stock.missing:
        present["vllm_bf16"] = stock.bf16(tensors)
    if not refusal:
        present["stock"] = stock.prepare(tensors)
    before = _check(present["ours"], oracle)
    stock_parity = None if refusal else _check(present["stock"], oracle)
    times = time_turns(present, settings.seconds)
    after = _check(present["ours"], oracle)
    notes = [refusal] if refusal else []
    ok = before.ok and after.ok
    if not ok:
        notes.append("parity failed: the time is that of a wrong result")
    if stock_parity and not stock_parity.ok:
        notes.append("vLLM's own result is outside the tolerance too")
    found = Checked(ok, before.rel_l2, stock_parity.rel_l2 if stock_parity else None)
    return _row(case, present["ours"], times, settings, found, "; ".join(notes) or None)


@dataclass(frozen=True, slots=True)
class Checked:
    """What the comparisons of a case found.

    Attributes:
        ok: the plugin computed the right result, before and after the clock ran.
        rel_l2: its error.
        stock_rel_l2: vLLM's.
    """

    ok: bool
    rel_l2: float | None
    stock_rel_l2: float | None


def _check(prepared: Prepared, oracle: data.Oracle) -> Parity:
    assert prepared.last is not None
    prepared.run(0)
    return oracle.compare(prepared.last())


def _row(
    case: LinearCase,
    ours: Prepared,
    times: Times,
    settings: Settings,
    found: Checked,
    note: str | None,
) -> LinearRow:
    seconds = statistics.median(times["ours"])

    def milliseconds(name: str) -> float | None:
        return _digits(statistics.median(times[name]) * 1e3) if name in times else None

    def ratio(name: str) -> float | None:
        if name not in times or not found.ok:
            return None
        pairs = zip(times[name], times["ours"], strict=True)
        return _digits(statistics.median(other / own for other, own in pairs))

    return LinearRow(
        scheme=case.scheme,
        m=case.m,
        n=case.n,
        k=case.k,
        group=case.group,
        implementation=ours.implementation,
        isa=ours.isa,
        threads=settings.threads,
        layers=case.layers,
        time_ms=_digits(seconds * 1e3),
        bf16_time_ms=milliseconds("bf16") or 0.0,
        vllm_bf16_time_ms=milliseconds("vllm_bf16"),
        stock_time_ms=milliseconds("stock"),
        best_ms=_digits(min(times["ours"]) * 1e3),
        bf16_best_ms=_digits(min(times["bf16"]) * 1e3),
        ratio_vs_bf16=ratio("bf16"),
        ratio_vs_vllm_bf16=ratio("vllm_bf16"),
        ratio_vs_stock=ratio("stock"),
        gb_per_s=_digits(case.weight_bytes / seconds / 1e9),
        gflop_per_s=_digits(case.flop / seconds / 1e9),
        rel_l2=None if found.rel_l2 is None else _digits(found.rel_l2),
        stock_rel_l2=None if found.stock_rel_l2 is None else _digits(found.stock_rel_l2),
        parity_ok=found.ok,
        pairs=len(times["ours"]),
        note=note,
    )


def _digits(value: float) -> float:
    """Round to four significant digits: more would be noise."""
    return float(f"{value:.4g}")


def _require_memory(case: LinearCase) -> None:
    """Refuse a case before the machine starts to swap.

    Raises:
        BenchError: the weights of all contenders need more than is available.
    """
    # bfloat16 twice and quantised twice per layer; the oracle holds the weight in float64 twice.
    per_layer = 2 * case.bf16_bytes + 2 * case.weight_bytes
    needed = per_layer * case.layers + 8 * case.bf16_bytes + 8 * case.m * (case.n + case.k) + 2**30
    available = machine.available_memory()
    if available is not None and needed > available:
        raise BenchError(
            f"{case.label} needs about {needed / 2**30:.1f} GiB of memory and "
            f"{available / 2**30:.1f} GiB are available. Choose a smaller --shape."
        )
