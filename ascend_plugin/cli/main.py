"""``ascend-plugin``: the commands, and the one place where errors become sentences."""

from __future__ import annotations

import os
import sys
from importlib import metadata
from typing import Annotated

import typer

from ascend_plugin.cli.bench import app as bench_app
from ascend_plugin.cli.calibrate import app as calibrate_app
from ascend_plugin.cli.doctor.command import doctor
from ascend_plugin.cli.evaluate import app as eval_app
from ascend_plugin.cli.inspect import inspect
from ascend_plugin.cli.mtp import app as mtp_app
from ascend_plugin.cli.quantize import convert, quantize
from ascend_plugin.cli.sim import app as sim_app
from ascend_plugin.model.cli import app as model_app

app = typer.Typer(
    name="ascend-plugin",
    no_args_is_help=True,
    add_completion=False,
    # Errors that are not the project's own are bugs: a plain traceback is what a report needs.
    pretty_exceptions_enable=False,
)
app.add_typer(model_app, name="model")
app.add_typer(bench_app, name="bench")
app.add_typer(calibrate_app, name="calibrate")
app.add_typer(eval_app, name="eval")
app.add_typer(mtp_app, name="mtp")
app.add_typer(sim_app, name="sim")
app.command()(doctor)
app.command()(inspect)
app.command()(quantize)
app.command()(convert)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(metadata.version("ascend-plugin"))
        raise typer.Exit


@app.callback()
def root(
    context: typer.Context,
    debug: Annotated[
        bool, typer.Option("--debug", help="Show tracebacks and everything that vLLM logs.")
    ] = False,
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_print_version, is_eager=True, help="Print the version."
        ),
    ] = False,
) -> None:
    """Check, measure and supply ascend-plugin, a vLLM plugin for Ascend NPUs and CPUs."""
    # vLLM reads its level once, when a command imports it.
    # `sim run` becomes another command, whose log is the user's business.
    if context.invoked_subcommand != "sim":
        os.environ.setdefault("VLLM_LOGGING_LEVEL", "INFO" if debug else "ERROR")


def main() -> None:
    """Run the command line: exit code 0, 1 for an error or a failed check, 2 for wrong usage."""
    try:
        app()
    except Exception as error:
        if not _is_ours(error) or "--debug" in sys.argv:
            raise
        print(f"Error: {error}", file=sys.stderr)
        sys.exit(1)


def _is_ours(error: Exception) -> bool:
    """Return whether the error's class is the project's own: its message is for users."""
    return type(error).__module__.partition(".")[0] == "ascend_plugin"


if __name__ == "__main__":
    main()
