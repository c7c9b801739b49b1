"""``ascend-plugin inspect``: how a quantised checkpoint runs, without running it."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, TextIO

import typer

from ascend_plugin.cli.output import clean_stdout, table_console, write_json
from ascend_plugin.device import detect_device
from ascend_plugin.quantization.errors import CheckpointError
from ascend_plugin.quantization.target import Target

if TYPE_CHECKING:
    from rich.table import Table

    from ascend_plugin.quantization.report import ModuleRow, SchemeTotal
    from ascend_plugin.quantization.scheme import Checkpoint


_DEVICES = {Target.CPU: "a CPU", Target.NPU: "an NPU"}


def inspect(
    checkpoint: Annotated[Path, typer.Argument(help="Folder of the checkpoint.")],
    as_json: Annotated[bool, typer.Option("--json", help="Write JSON, a row per module.")] = False,
    every: Annotated[
        bool, typer.Option("--all", help="Show every module, not one line for alike ones.")
    ] = False,
    device: Annotated[
        Target | None, typer.Option(help="What to plan for; this machine's device if not given.")
    ] = None,
) -> None:
    """Show which module of a checkpoint runs how, what stays float and why, and the memory."""
    with clean_stdout() as stdout:
        from ascend_plugin.quantization.formats import describe
        from ascend_plugin.quantization.report import module_rows, totals

        if not checkpoint.is_dir():
            raise CheckpointError(
                f"{checkpoint}: no such folder; expected the folder of a checkpoint with its "
                "config.json and safetensors files."
            )
        found = describe(checkpoint)
        if found is None:
            raise CheckpointError(
                f"{checkpoint}: not quantised, or in a way that vLLM serves by itself; expected "
                "ModelSlim's quant_model_description.json, or a quantization_config of integers "
                "(compressed-tensors, AWQ, GPTQ) in config.json."
            )
        target = device or Target(detect_device().kind)
        rows, memory = module_rows(found, target), totals(found, target)
        if as_json:
            write_json(stdout, [asdict(row) for row in rows], _meta(found, target, memory))
        else:
            _print(stdout, found, target, rows, memory, every)


def _meta(found: Checkpoint, target: Target, memory: list[SchemeTotal]) -> dict[str, object]:
    return {
        "device": target.value,
        "checkpoint": str(found.folder),
        "format": found.source.value,
        "kv_cache": None if found.kv is None else asdict(found.kv),
        "notes": list(found.notes),
        "memory": [asdict(row) for row in memory],
        "bytes": sum(row.bytes for row in memory),
    }


def _print(
    stdout: TextIO,
    found: Checkpoint,
    target: Target,
    rows: list[ModuleRow],
    memory: list[SchemeTotal],
    every: bool,
) -> None:
    console = table_console(stdout)
    console.print(_modules_table(found, target, rows, every))
    console.print(_memory_table(memory))
    if found.kv is not None:
        console.print(f"KV cache: {found.kv.kind} scales of {found.kv.layers} layers.")
    for note in found.notes:
        console.print(f"{note}.")


def _modules_table(found: Checkpoint, target: Target, rows: list[ModuleRow], every: bool) -> Table:
    from rich.table import Table

    from ascend_plugin.quantization.report import grouped_rows

    table = Table(
        title=f"{found.folder} ({found.source}) on {_DEVICES[target]}",
        title_justify="left",
        box=None,
        pad_edge=False,
    )
    for name in ("module", "count", "scheme", "bits", "group", "n × k", "source", "runs as"):
        table.add_column(name)
    for name in ("kernel", "MiB", "note"):
        table.add_column(name)
    shown = [(row.module, row, 1, row.bytes) for row in rows] if every else grouped_rows(rows)
    for name, row, count, size in shown:
        table.add_row(
            name,
            str(count),
            row.scheme,
            str(row.bits),
            "–" if row.group is None else str(row.group),
            f"{row.n} × {row.k}",
            row.source,
            row.runs_as,
            row.kernel,
            f"{size / 2**20:.2f}",
            "; ".join(part for part in (row.note, row.rotations) if part),
        )
    return table


def _memory_table(memory: list[SchemeTotal]) -> Table:
    from rich.table import Table

    table = Table(title="memory", title_justify="left", box=None, pad_edge=False)
    for name in ("scheme", "runs as", "modules", "MiB", "of bf16"):
        table.add_column(name)
    for row in memory:
        part = "–" if not row.weights else f"{row.bytes / row.bf16_bytes:.2f}"
        table.add_row(row.scheme, row.runs_as, str(row.modules), f"{row.bytes / 2**20:.2f}", part)
    return table
