"""Results as tables."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from rich.table import Table

from ascend_plugin.bench.attention.rows import AttentionRow
from ascend_plugin.bench.linear.cases import scheme_label
from ascend_plugin.bench.linear.rows import LinearRow
from ascend_plugin.bench.mla.cases import MlaRow
from ascend_plugin.bench.npu_cost.rows import CostRow, KernelRow
from ascend_plugin.bench.serve.rows import ServeRow

if TYPE_CHECKING:  # torch must not be imported for a table: on an NPU that prints to stdout
    from ascend_plugin.mtp.evaluate import EvalResult


def attention_table(rows: Sequence[AttentionRow], meta: Mapping[str, object]) -> Table:
    """Return the table of ``bench attention``."""
    table = _table(f"attention, {_where(meta)}")
    table.add_column("case")
    table.add_column("runs on")
    speed = ("ms", "vLLM ms", "ratio", "GB/s", "read GB/s", "GFLOP/s")
    for name in (*speed, "rel L2", "vLLM rel L2", "tokens/GiB"):
        table.add_column(name, justify="right")
    table.add_column("note")
    for row in rows:
        table.add_row(
            _case(row),
            row.isa or row.implementation,
            _number(row.time_ms),
            _number(row.stock_time_ms),
            _ratio(row.parity_ok, row.ratio_vs_stock),
            _number(row.gb_per_s),
            _number(row.read_gb_per_s),
            _number(row.gflop_per_s),
            _number(row.rel_l2_vs_fp64),
            _number(row.stock_rel_l2_vs_fp64),
            f"{row.kv_tokens_per_gib} ({row.kv_tokens_vs_bf16:.2f}×)",
            row.note or "",
        )
    return table


def linear_table(rows: Sequence[LinearRow], meta: Mapping[str, object]) -> Table:
    """Return the table of ``bench linear``."""
    table = _table(f"linear layers, {_where(meta)}")
    table.add_column("case")
    table.add_column("runs on")
    speed = ("ms", "bf16 ms", "ratio", "vLLM bf16 ms", "ratio", "vLLM ms", "ratio", "GB/s")
    for name in (*speed, "GFLOP/s", "rel L2", "vLLM rel L2"):
        table.add_column(name, justify="right")
    table.add_column("note")
    for row in rows:
        table.add_row(
            f"{scheme_label(row.scheme, row.group, row.k)} {row.n}×{row.k}, {row.m} rows",
            row.isa or row.implementation,
            _number(row.time_ms),
            _number(row.bf16_time_ms),
            _ratio(row.parity_ok, row.ratio_vs_bf16),
            _number(row.vllm_bf16_time_ms),
            _ratio(row.parity_ok, row.ratio_vs_vllm_bf16),
            _number(row.stock_time_ms),
            _ratio(row.parity_ok, row.ratio_vs_stock),
            _number(row.gb_per_s),
            _number(row.gflop_per_s),
            _number(row.rel_l2),
            _number(row.stock_rel_l2),
            row.note or "",
        )
    return table


def mla_table(rows: Sequence[MlaRow], meta: Mapping[str, object]) -> Table:
    """Return the table of ``bench mla``."""
    table = _table(f"latent attention, {_where(meta)}")
    table.add_column("case")
    table.add_column("runs on")
    speed = ("ms", "vLLM ms", "ratio", "GFLOP/s", "vLLM GFLOP/s", "GB/s")
    for name in (*speed, "rel L2", "vLLM rel L2", "bytes/token"):
        table.add_column(name, justify="right")
    table.add_column("note")
    for row in rows:
        table.add_row(
            f"{row.variant} batch {row.batch} context {row.context} heads {row.heads}",
            row.isa or row.implementation,
            _number(row.time_ms),
            _number(row.stock_time_ms),
            _ratio(row.parity_ok, row.ratio_vs_stock),
            _number(row.gflop_per_s),
            _number(row.stock_gflop_per_s),
            _number(row.gb_per_s),
            _number(row.rel_l2_vs_fp64),
            _number(row.stock_rel_l2_vs_fp64),
            str(row.bytes_per_token),
            row.note or "",
        )
    return table


def serve_table(rows: Sequence[ServeRow], meta: Mapping[str, object]) -> Table:
    """Return the table of ``bench serve``."""
    table = _table(f"serving, {_where(meta)}, execution {meta['execution']}")
    table.add_column("model")
    peer = any(row.peer_decode_tok_s is not None for row in rows)
    for name in (
        *("batch", "context", "decode tok/s", "vLLM tok/s", "ratio"),
        *(("llama.cpp tok/s", "ratio", "llama.cpp TTFT ms") if peer else ()),
        *("TTFT ms", "vLLM TTFT ms", "TTFT ratio", "equal tokens"),
    ):
        table.add_column(name, justify="right")
    table.add_column("note")
    for row in rows:
        speeds = [_number(row.decode_tok_s), _number(row.stock_decode_tok_s)]
        speeds.append(_ratio(True, row.ratio_vs_stock))
        if peer:
            speeds += [_number(row.peer_decode_tok_s), _ratio(True, row.ratio_vs_peer)]
            speeds.append(_number(row.peer_ttft_ms))
        compared = row.tokens_compared
        table.add_row(
            f"{row.model} {row.variant}",
            str(row.batch),
            str(row.context),
            *speeds,
            _number(row.ttft_ms),
            _number(row.stock_ttft_ms),
            "–" if row.ttft_ratio_vs_stock is None else f"{row.ttft_ratio_vs_stock:.2f}×",
            "–" if compared is None else f"{row.tokens_equal_prefix} of {compared}",
            row.note or "",
        )
    return table


def cost_table(rows: Sequence[CostRow], meta: Mapping[str, object]) -> Table:
    """Return the table of ``bench npu-cost``."""
    where = "simulated NPU; times are estimates" if meta["simulated"] else "this machine's NPU"
    table = _table(f"decode step, {where}, per layer and for all layers")
    for name in ("model", "phase", "graphs"):
        table.add_column(name)
    counted = ("batch", "context", "layers", "launches/layer", "launches/accepted token")
    sizes = ("MB/layer", "MB/token")
    for name in (*counted, *sizes, "estimated µs", "measured µs"):
        table.add_column(name, justify="right")
    table.add_column("bound")
    table.add_column("note")
    for row in rows:
        table.add_row(
            row.model,
            f"{row.phase} {row.variant}",
            row.graphs,
            *(str(count) for count in (row.batch, row.context, row.layers)),
            _number(row.launches_per_layer),
            _number(row.launches_per_accepted_token),
            f"{row.bytes_per_layer / 1e6:.3f}",
            f"{row.bytes_per_token / 1e6:.1f}",
            _number(row.estimated_us),
            _number(row.measured_us),
            row.bound,
            row.note or "",
        )
    return table


def kernel_table(rows: Sequence[KernelRow], meta: Mapping[str, object]) -> Table:
    """Return the table of the kernel of attention of ``bench npu-cost``."""
    where = "estimates of its host model" if meta["simulated"] else "measured"
    table = _table(f"AscendC kernel of attention, one layer, {where}")
    table.add_column("phase")
    counted = ("batch", "query tokens", "context", "cycles", "estimated µs", "measured µs")
    for name in (*counted, "roofline µs", "pages MB", "read ÷ pages"):
        table.add_column(name, justify="right")
    for name in ("bound", "busiest", "note"):
        table.add_column(name)
    for row in rows:
        table.add_row(
            f"{row.phase} {row.variant}",
            *(str(count) for count in (row.batch, row.query_tokens, row.context)),
            "–" if row.cycles is None else str(row.cycles),
            _number(row.estimated_us),
            _number(row.measured_us),
            _number(row.roofline_us),
            f"{row.pages_bytes / 1e6:.2f}",
            _number(row.pages_read_ratio),
            row.bound or "",
            "" if row.busiest is None else f"{row.busiest} {row.busiest_cycles}",
            row.note or "",
        )
    return table


def mtp_table(result: EvalResult, meta: Mapping[str, object]) -> Table:
    """Return the table of ``mtp eval``."""
    table = _table(f"{meta['model']}, {meta['drafts']} drafts, {_where(meta)}")
    table.add_column("what")
    table.add_column("value", justify="right")
    for i, share in enumerate(result.acceptance):
        table.add_row(f"proposals whose draft {i + 1} was accepted", f"{100 * share:.1f} %")
    table.add_row("tokens per proposal", f"{result.mean_accepted_length:.2f}")
    table.add_row("proposals", str(result.proposals))
    table.add_row("prompts with another answer (near-ties)", str(result.different))
    head = result.speculation.get("draft_head")
    table.add_row("drafts are chosen among", f"{head} tokens" if head else "all tokens")
    if steps := result.speculation.get("steps"):
        shares = ", ".join(f"{k}: {100 * n / sum(steps):.0f} %" for k, n in enumerate(steps))
        table.add_row("steps by number of drafts, all prompts", shares)
    for size, ratio in (("1", result.speedup_b1), ("8", result.speedup_b8)):
        if ratio is not None:
            with_, without = result.decode[size]
            speed = f"[bold]{ratio:.2f}×[/] ({with_:.1f} and {without:.1f} tok/s)"
            table.add_row(f"decode at batch {size}, with and without", speed)
    return table


def _table(title: str) -> Table:
    return Table(title=title, title_justify="left", box=None, pad_edge=False, header_style="bold")


def _where(meta: Mapping[str, object]) -> str:
    return f"{meta['cpu']}, {meta['threads']} threads, load {meta['load_average']}"


def _case(row: AttentionRow) -> str:
    if row.phase == "write":
        return f"write {row.variant} {row.batch} tokens"
    size = f"{row.new_tokens} new of {row.context}" if row.phase == "prefill" else f"{row.context}"
    return f"{row.phase} {row.variant} {row.batch} × {size}"


def _ratio(parity_ok: bool, ratio: float | None) -> str:
    if not parity_ok:
        return "[bold red]parity failed[/]"
    return "–" if ratio is None else f"[bold]{ratio:.2f}×[/]"


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:g}"
