"""``ascend-plugin sim``: run any command on a simulated NPU."""

from __future__ import annotations

import os
import shutil
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from ascend_plugin.cli.output import progress, write_json
from ascend_plugin.ops import sim as simulator
from ascend_plugin.ops.sim.home import cache_folder
from ascend_plugin.ops.sim.options import parse_size
from ascend_plugin.versions import tested_versions

app = typer.Typer(no_args_is_help=True)

_BANNER = """\
************************************************************************
*  SIMULATED NPU: {what:<52} *
*  torch_npu is real; the chip is not. Values come from the CPU, and   *
*  times and speed say nothing about the hardware.                     *
************************************************************************"""


@app.callback()
def sim() -> None:
    """Run commands on a simulated NPU: the real torch_npu, without CANN and without a chip."""


@app.command()
def build(
    wheel: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="The torch_npu wheel; fetched with pip if not given."),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Build although it is built.")] = False,
) -> None:
    """Build the simulator, and the host models of the AscendC kernels, into the cache.

    `run` does the first by itself, and its processes the second when they first want a kernel.
    """
    with progress() as report:
        built = simulator.build(_version(), wheel, force, report)
        # Late: this imports torch.
        from ascend_plugin.ops.ascendc import library as kernels

        kernels.build_models(built.packages, report, force)
    typer.echo(f"The simulated NPU for torch_npu {built.version} is in {built.libraries}.")


@app.command()
def status(
    as_json: Annotated[
        bool, typer.Option("--json", help="Print one JSON object: rows and meta.")
    ] = False,
) -> None:
    """Say whether the simulator is built and where; exit code 1 if it is not."""
    found = simulator.status(_version())
    if as_json:
        rows = [{name: str(value) for name, value in asdict(found).items()}] if found else []
        write_json(sys.stdout, rows, {"cache": str(cache_folder()), "version": _version()})
    elif found is None:
        typer.echo(
            f"The simulated NPU for torch_npu {_version()} is not built in {cache_folder()}. "
            "Run: ascend-plugin sim build."
        )
    else:
        where = "installed" if found.installed else "unpacked"
        typer.echo(f"torch_npu {found.version}, {where}: {found.packages}")
        typer.echo(f"stand-ins for CANN: {found.libraries}")
    if found is None:
        raise typer.Exit(1)


@app.command(context_settings={"ignore_unknown_options": True, "allow_interspersed_args": False})
def run(
    command: Annotated[list[str], typer.Argument(metavar="-- COMMAND...", help="What to run.")],
    devices: Annotated[int, typer.Option(help="NPUs of the machine.")] = 1,
    memory: Annotated[str, typer.Option(help="Memory of each NPU and process.")] = "8GiB",
    streams: Annotated[int, typer.Option(help="Streams of each NPU and process.")] = 2048,
    soc: Annotated[str, typer.Option(help="The chip that torch_npu is told.")] = "Ascend910B1",
    schedule: Annotated[
        str, typer.Option(help="When a stream's tasks run: lazy, eager or random.")
    ] = "lazy",
    seed: Annotated[int, typer.Option(help="Of the random schedule.")] = 0,
    trace: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Append a JSON line per operator launch.")
    ] = None,
    products: Annotated[
        bool,
        typer.Option(help="Compute matrix products; without, they are zeros, to count launches."),
    ] = True,
    task_queue: Annotated[
        int, typer.Option(min=0, max=2, help="torch_npu's TASK_QUEUE_ENABLE.")
    ] = 0,
    timeout: Annotated[
        float, typer.Option(help="Seconds until a wait without end is an error.")
    ] = 60.0,
    peer_timeout: Annotated[
        float, typer.Option(help="The same for a collective whose peers live but do not come.")
    ] = 600.0,
) -> None:
    """Run COMMAND, and every process it starts, on simulated NPUs."""
    options = simulator.SimulatorOptions(
        devices=devices,
        memory=parse_size(memory),
        streams=streams,
        soc=soc,
        schedule=schedule,
        seed=seed,
        trace=str(trace.absolute()) if trace else "",
        products=products,
        timeout=timeout,
        peer_timeout=peer_timeout,
    )
    program = _found(command[0])
    with progress() as report:
        built = simulator.build(_version(), report=report)
    what = f"{devices} x {soc}, {memory}, {schedule} schedule"
    print(_BANNER.format(what=what), file=sys.stderr, flush=True)
    os.execve(program, command, built.environment(options, task_queue, os.environ))


def _found(command: str) -> str:
    """Return the path of a command."""
    program = shutil.which(command)
    if program is None:
        raise simulator.SimulatorError(
            f"the command {command!r} is not on PATH; give one after --, as in "
            "ascend-plugin sim run -- python script.py."
        )
    return program


def _version() -> str:
    return tested_versions()["torch-npu"]
