"""The command: collect, show, exit code."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Annotated, TextIO

import typer

from ascend_plugin.bench import machine
from ascend_plugin.cli.doctor.check import Check, Status
from ascend_plugin.cli.output import clean_stdout, progress, table_console, write_json

_MARKS: dict[Status, str] = {
    "ok": "[green]ok[/]",
    "warning": "[yellow]warning[/]",
    "problem": "[bold red]problem[/]",
}


def doctor(
    as_json: Annotated[
        bool, typer.Option("--json", help="Print one JSON object: rows and meta.")
    ] = False,
) -> None:
    """Check versions, device, kernels and plugins; say what is wrong and what to do.

    Exit code 1 if there is a problem; warnings do not count.
    """
    load = machine.load_average()
    with clean_stdout() as stdout:
        from ascend_plugin.cli.doctor.collect import collect

        with progress() as report:
            rows, isa = collect(report)
        if as_json:
            meta = machine.describe(machine.available_cpus(), isa, load)
            write_json(stdout, [asdict(row) for row in rows], meta)
        else:
            _print_rows(stdout, rows)
    if any(row.status == "problem" for row in rows):
        raise typer.Exit(1)


def _print_rows(stdout: TextIO, rows: Sequence[Check]) -> None:
    from rich.markup import escape
    from rich.table import Table

    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("check", no_wrap=True)
    table.add_column("status", no_wrap=True)
    table.add_column("what was found, and what to do", overflow="fold")
    for row in rows:
        remedy = f"\n[bold]→ {escape(row.remedy)}[/]" if row.remedy else ""
        table.add_row(row.name, _MARKS[row.status], escape(row.detail) + remedy)
    console = table_console(stdout)
    console.print(table)
    counts = {name: sum(row.status == name for row in rows) for name in _MARKS}
    console.print(
        f"\n{len(rows)} checks: {counts['problem']} problem(s), {counts['warning']} warning(s)."
    )
