"""Runs the cases of ``bench attention`` and makes their rows."""

from __future__ import annotations

import os
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch

from ascend_plugin.bench import machine
from ascend_plugin.bench.attention import parity
from ascend_plugin.bench.attention.cases import Case, same_shape
from ascend_plugin.bench.attention.contenders import Contender, PluginContender, plain_reader
from ascend_plugin.bench.attention.data import QUIET_SHARE, CaseData, make_data, unquantised
from ascend_plugin.bench.attention.rows import AttentionRow
from ascend_plugin.bench.attention.stock import StockContender
from ascend_plugin.bench.errors import BenchError
from ascend_plugin.bench.outcome import Outcome
from ascend_plugin.bench.runtime import apply_settings
from ascend_plugin.bench.settings import Settings
from ascend_plugin.bench.timing import PairedTimes, Prepared, time_turns
from ascend_plugin.kv_cache import PageFormat
from ascend_plugin.worker.cpu_steps import MAX_TOKENS

Report = Callable[[str], None]

#: Names of contenders beside the variants.
_STOCK, _READS = "stock", "reads"


def run_cases(cases: Sequence[Case], settings: Settings, report: Report) -> Outcome[AttentionRow]:
    """Measure every case; those of one shape in the same turns.

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
    found: dict[Case, AttentionRow] = {}
    memory = set()
    with torch.no_grad():
        for shape in same_shape(cases):
            for group in _fitting(shape, stock):
                report(f"{len(found) + 1}/{len(cases)} {', '.join(case.label for case in group)}")
                measured = _run_group(group, ours, stock, settings)
                for case, (row, remark) in zip(group, measured, strict=True):
                    found[case] = row
                    memory.add(remark)
    rows = [found[case] for case in cases]
    isa = next((row.isa for row in rows if row.isa), None)
    return Outcome(rows, isa, _method(settings, sorted(memory)))


def _method(settings: Settings, memory: list[str]) -> dict[str, object]:
    return {
        "seconds_per_case": settings.seconds,
        "interleaving": "call by call, A B C then C B A, each turn on the next layer's caches; "
        "A, B, C: every variant of a shape, vLLM, plain reads",
        "ratio_vs_stock": "median over turns of stock time / our time",
        "our_call": f"decode and write of up to {MAX_TOKENS} rows: repeated from a recorded step, "
        "as the engine does, if it is native; else the operator. vLLM's: its operator, from Python",
        "our_cache": f"torch.zeros, then moved to huge pages as the worker does: {memory}",
        "stock_cache": "torch.zeros, as vLLM allocates it; not quantised",
        "int8_data": f"{QUIET_SHARE:.0%} of (token, head) rows are ten times smaller than the rest",
        "rel_l2_vs_pages": "against float64 over what the pages hold; parity_ok judges this one",
        "read_gb_per_s": "int64 maximum over another layer's pages, in the same turns; the first "
        "variant's",
        "gb_per_s": "K and V alone, without scales and patches",
        "stock_rel_l2_vs_fp64": "null for write: vLLM's layout is its own",
        "ld_preload": os.environ.get("LD_PRELOAD", ""),
    }


@dataclass(frozen=True, slots=True)
class Checked:
    """What the comparisons of a case found.

    Attributes:
        ok: the plugin computed what its pages say.
        page_rel_l2: its error against that.
        rel_l2: its error against keys and values as they were before any page.
    """

    ok: bool
    page_rel_l2: float | None
    rel_l2: float | None


@dataclass(frozen=True, slots=True)
class Shared:
    """What the cases of one shape have in common.

    Attributes:
        threads: of each contender.
        read_rate: of plain reads in the same turns, GB/s; None: there were none.
        refusal: why vLLM did not run; None: it did.
        stock: how right vLLM was; None: nobody asked.
    """

    threads: int
    read_rate: float | None
    refusal: str | None
    stock: parity.Parity | None


@dataclass(frozen=True, slots=True)
class _Entry:
    """A case that is ready to be measured.

    Attributes:
        data: inputs.
        run: the plugin's call.
        oracle: what its pages mean; None for write.
        checked: what was found before the clock runs.
    """

    data: CaseData
    run: Prepared
    oracle: parity.Oracle | None
    checked: Checked

    @classmethod
    def of(cls, case: Case, ours: Contender) -> _Entry:
        """Prepare a case and check one call of it."""
        data = make_data(case)
        run = ours.prepare(data)
        if case.phase == "write":
            before = parity.check_write(run, data)
            return cls(data, run, None, Checked(before.ok, before.rel_l2, before.rel_l2))
        oracle = parity.attention_oracle(data)
        before = parity.check_attention(run, oracle)
        truth = before
        if case.quantisation is not None:
            truth = parity.attention_oracle(unquantised(data)).compare(run.result)
        return cls(data, run, oracle, Checked(before.ok, before.rel_l2, truth.rel_l2))

    def after(self) -> Checked:
        """Check again, now that the clock has run."""
        if self.oracle is None:
            ok = parity.compare_pages(self.run, self.data).ok
        else:
            ok = self.oracle.compare(self.run.result).ok
        return replace(self.checked, ok=self.checked.ok and ok)


def _run_group(
    group: Sequence[Case], ours: Contender, stock: Contender, settings: Settings
) -> list[tuple[AttentionRow, str]]:
    """Measure cases of one shape in the same turns; return rows, and how caches were allocated."""
    entries = [_Entry.of(case, ours) for case in group]
    first = entries[0]
    refusal = stock.refusal(first.data.case)
    contenders: dict[str, Prepared] = {entry.data.case.variant: entry.run for entry in entries}
    stock_parity = None
    if refusal is None:
        theirs = stock.prepare(first.data)
        if first.oracle is not None:
            exact = parity.attention_oracle(unquantised(first.data))
            stock_parity = parity.check_attention(theirs, exact)
        contenders[_STOCK] = theirs
    if group[0].phase == "decode":
        contenders[_READS] = plain_reader(first.run)
    times = time_turns(contenders, settings.seconds * len(group))
    reads = times.get(_READS, ())
    read_rate = None
    if reads:
        read_rate = first.data.pages.nbytes / statistics.median(reads) / 1e9
    return [
        (
            _row(
                entry,
                PairedTimes(times[entry.data.case.variant], times.get(_STOCK, ())),
                Shared(settings.threads, read_rate, refusal, stock_parity),
            ),
            entry.run.remark,
        )
        for entry in entries
    ]


def _row(entry: _Entry, times: PairedTimes, shared: Shared) -> AttentionRow:
    data, checked, stock = entry.data, entry.after(), shared.stock
    case, geometry = data.case, data.case.geometry
    notes = [shared.refusal] if shared.refusal else []
    if not checked.ok:
        notes.append("parity failed: the time is that of a wrong result")
    if stock and not stock.ok:
        notes.append("vLLM's own result is outside the tolerance too")
    seconds, stock_seconds = times.median, times.stock_median
    return AttentionRow(
        phase=case.phase,
        variant=case.variant,
        implementation=entry.run.implementation,
        isa=entry.run.isa,
        batch=case.batch,
        context=case.context,
        new_tokens=case.new_tokens,
        heads=geometry.heads,
        kv_heads=geometry.kv_heads,
        head_dim=geometry.head_dim,
        block_size=geometry.block_size,
        threads=shared.threads,
        time_ms=_digits(seconds * 1e3),
        stock_time_ms=None if stock_seconds is None else _digits(stock_seconds * 1e3),
        best_ms=_digits(min(times.ours) * 1e3),
        stock_best_ms=_digits(min(times.stock) * 1e3) if times.stock else None,
        ratio_vs_stock=_optional(times.ratio if checked.ok else None),
        gb_per_s=_digits(case.moved_bytes / seconds / 1e9),
        read_gb_per_s=_optional(shared.read_rate),
        gflop_per_s=_optional(case.flop / seconds / 1e9 if case.flop else None),
        rel_l2_vs_fp64=_optional(checked.rel_l2),
        rel_l2_vs_pages=_optional(checked.page_rel_l2),
        stock_rel_l2_vs_fp64=_optional(stock.rel_l2 if stock else None),
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


def _fitting(cases: Sequence[Case], stock: Contender) -> list[Sequence[Case]]:
    """Divide cases of one shape into groups that fit into memory; one group if all of them do.

    Raises:
        BenchError: a case alone does not fit.
    """
    with_stock = stock.refusal(cases[0]) is None
    needed = sum(_memory_of(case) for case in cases) + 2**30
    needed += cases[0].stock_cache_bytes * cases[0].layers * with_stock
    available = machine.available_memory()
    if available is None or needed <= available:
        return [cases]
    if len(cases) > 1:
        half = len(cases) // 2
        return [*_fitting(cases[:half], stock), *_fitting(cases[half:], stock)]
    raise BenchError(
        f"{cases[0].label} needs about {needed / 2**30:.1f} GiB of memory and "
        f"{available / 2**30:.1f} GiB are available. Lower --batch or --context."
    )


def _memory_of(case: Case) -> int:
    """Return bytes of the plugin's caches of a case, of its inputs and of what checks it."""
    return case.cache_bytes * case.layers + case.stock_cache_bytes * 6
