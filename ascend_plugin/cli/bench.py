"""``ascend-plugin bench``: options in, tables or one JSON object out."""

from __future__ import annotations

import importlib
import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from ascend_plugin.bench import machine
from ascend_plugin.bench.attention import cases
from ascend_plugin.bench.errors import BenchError
from ascend_plugin.bench.linear import cases as linear_cases
from ascend_plugin.bench.npu_cost.settings import DEFAULT_ACCEPTANCE
from ascend_plugin.bench.settings import Settings as OperatorSettings
from ascend_plugin.cli import bench_options as options
from ascend_plugin.cli.output import clean_stdout, progress, remark, table_console, write_json

if TYPE_CHECKING:
    from ascend_plugin.bench.npu_cost.settings import Settings as CostSettings
    from ascend_plugin.bench.serve.contest import Entrants
    from ascend_plugin.bench.serve.settings import Settings as ServeSettings

app = typer.Typer(no_args_is_help=True)


@app.callback()
def bench() -> None:
    """Measure the plugin against vLLM's own CPU code, interleaved in the same run."""


@app.command()
def attention(
    phase: options.Phases = None,
    variant: options.Variants = None,
    batch: options.AttentionBatches = None,
    context: options.AttentionContexts = None,
    new_tokens: options.PrefillTokens = cases.DEFAULT_NEW_TOKENS,
    heads: options.Heads = 32,
    kv_heads: options.KVHeads = 8,
    head_dim: options.HeadDim = 128,
    block_size: options.BlockSize = 128,
    threads: options.Threads = None,
    implementation: options.Implementation = None,
    isa: options.Isa = None,
    seconds: options.Seconds = 3.0,
    plot: options.Plot = None,
    as_json: options.AsJson = False,
) -> None:
    """Measure attention and cache writes on caches that do not fit into the processor's cache.

    Every result is compared with a float64 oracle; a wrong one has no ratio, and exit code 1.
    """
    from ascend_plugin.bench.plot_path import check_plot_path

    geometry = cases.Geometry(heads, kv_heads, head_dim, block_size)
    wanted = cases.make_cases(
        phase or (), variant or (), batch or (), context or (), new_tokens, geometry
    )
    cpus = machine.available_cpus() if threads is None else threads
    settings = OperatorSettings(cpus, seconds, implementation, isa)
    if plot:
        check_plot_path(plot)
    _measure_operators("attention", wanted, settings, as_json, plot)


@app.command()
def linear(
    scheme: options.LinearSchemes = None,
    shape: options.LinearShapes = None,
    rows: options.LinearRows = None,
    group: options.LinearGroup = linear_cases.DEFAULT_GROUP,
    threads: options.Threads = None,
    implementation: options.Implementation = None,
    isa: options.Isa = None,
    seconds: options.Seconds = 3.0,
    plot: options.Plot = None,
    as_json: options.AsJson = False,
) -> None:
    """Measure quantised linear layers on weights that do not fit into the processor's cache.

    Every result is compared with a float64 oracle; a wrong one has no ratio, and exit code 1.
    """
    from ascend_plugin.bench.plot_path import check_plot_path

    wanted = linear_cases.make_cases(scheme or (), shape or (), rows or (), group)
    cpus = machine.available_cpus() if threads is None else threads
    settings = OperatorSettings(cpus, seconds, implementation, isa)
    if plot:
        check_plot_path(plot)
    _measure_operators("linear", wanted, settings, as_json, plot)


@app.command()
def mla(
    variant: options.LatentVariants = None,
    batch: options.MlaBatches = None,
    context: options.AttentionContexts = None,
    new_tokens: options.VerifiedTokens = 1,
    heads: options.Heads = 16,
    latent_dim: options.LatentDim = 512,
    rotary_dim: options.RotaryDim = 64,
    block_size: options.BlockSize = 128,
    threads: options.Threads = None,
    seconds: options.Seconds = 3.0,
    as_json: options.AsJson = False,
) -> None:
    """Measure decode steps of latent attention (MLA), by default of DeepSeek-V2-Lite's shape.

    Every result is compared with a float64 oracle; a wrong one has no ratio, and exit code 1.
    """
    from ascend_plugin.bench.mla.cases import make_cases

    shape = {"new_tokens": new_tokens, "heads": heads, "latent_dim": latent_dim}
    shape |= {"rotary_dim": rotary_dim, "block_size": block_size}
    wanted = make_cases(variant or ("bf16",), batch or (1, 8), context or (8192,), shape)
    cpus = machine.available_cpus() if threads is None else threads
    settings = OperatorSettings(cpus, seconds)
    _measure_operators("mla", wanted, settings, as_json)


@app.command()
def serve(
    model: options.Models = None,
    weights: options.ServeWeights = "bf16",
    batch: options.ServeBatches = None,
    context: options.ServeContexts = None,
    new_tokens: options.DecodeSteps = 32,
    rounds: options.Rounds = 3,
    threads: options.Threads = None,
    variant: options.ServeVariant = "bf16",
    scales: options.ServeScales = None,
    eager: options.Eager = None,
    stock: options.Stock = True,
    stock_model: options.StockModel = None,
    peer: options.ServePeer = None,
    gguf: options.Gguf = None,
    as_json: options.AsJson = False,
) -> None:
    """Measure whole engines: vLLM's CPU platform and the plugin, in turn, on the same prompts."""
    from ascend_plugin.bench.serve.contest import Entrants
    from ascend_plugin.bench.serve.models import DEFAULT_MODELS
    from ascend_plugin.bench.serve.settings import Settings

    settings = Settings(
        batches=tuple(batch or (8,)),
        contexts=tuple(context or (1536, 4096)),
        new_tokens=new_tokens,
        rounds=rounds,
        threads=machine.available_cpus() if threads is None else threads,
        variant=cases.known("--variant", variant, cases.VARIANTS),
        execution="default" if eager is None else "eager" if eager else "compile",
        scales=scales,
    )
    entrants = Entrants(model or DEFAULT_MODELS, weights, stock, stock_model, peer, gguf)
    _measure_serving(entrants, settings, as_json)


@app.command()
def npu_cost(
    model: options.CostModel = "qwen3-8b",
    variant: options.CostVariants = None,
    batch: options.CostBatch = 8,
    context: options.CostContext = 4096,
    graphs: options.CostGraphs = "full",
    drafts: options.CostDrafts = 3,
    acceptance: options.CostAcceptance = DEFAULT_ACCEPTANCE,
    sweep: options.CostSweep = False,
    naive: options.CostNaive = True,
    as_json: options.AsJson = False,
) -> None:
    """Count launches and bytes of a layer's decode step, on a simulated NPU; time it on a real one.

    Beside them a roofline of the chip, the same for vLLM's own chain of operators, and for int8
    caches what the AscendC kernel of attention reads and its estimate of cycles.
    """
    from ascend_plugin.bench.npu_cost.models import resolve_geometry
    from ascend_plugin.bench.npu_cost.settings import Settings

    geometry = resolve_geometry(model)
    wanted = [
        Settings(geometry, each, batch, context, graphs, drafts, sweep, naive, acceptance)
        for each in dict.fromkeys(variant or ["bf16"])
    ]
    _count_costs(wanted, as_json)


def _measure_operators(
    kind: str,
    wanted: Sequence[object],
    settings: OperatorSettings,
    as_json: bool,
    plot: Path | None = None,
) -> None:
    """Measure one kind of operators: ``bench/KIND/runner.py``, and a table of that name.

    Raises:
        BenchError: a result is not that of the reference; rows and table were written before.
    """
    load = _load_average()
    with clean_stdout() as stdout:
        with progress() as report:
            report("loading torch")
            runner = importlib.import_module(f"ascend_plugin.bench.{kind}.runner")
            outcome = runner.run_cases(wanted, settings, report)
        meta = machine.describe(settings.threads, outcome.isa, load) | outcome.method
        if plot:
            draw = importlib.import_module(f"ascend_plugin.bench.{kind}.plot").plot
            draw(outcome.rows, f"{meta['cpu']}, {settings.threads} threads", plot)
        if as_json:
            write_json(stdout, [asdict(row) for row in outcome.rows], meta)
        else:
            from ascend_plugin.cli import tables

            table = getattr(tables, f"{kind}_table")
            table_console(stdout).print(table(outcome.rows, meta))
    if not all(row.parity_ok for row in outcome.rows):
        raise BenchError(
            "parity failed: at least one result is not that of the float64 reference, so no "
            "speed-up is reported for it. Run the tests of the operators (tests/ops)."
        )


def _measure_serving(entrants: Entrants, settings: ServeSettings, as_json: bool) -> None:
    from ascend_plugin.bench.serve import runner
    from ascend_plugin.bench.serve.contest import make_contests
    from ascend_plugin.cli import tables

    with (
        clean_stdout() as stdout,
        tempfile.TemporaryDirectory(prefix="ascend-plugin-bench-") as folder,
    ):
        scratch = Path(folder)
        contests = make_contests(entrants, scratch)
        load = _load_average()
        with progress() as report:
            outcome = runner.run_contests(contests, settings, scratch, report)
        meta = machine.describe(settings.threads, outcome.isa, load)
        meta |= runner.method(settings, outcome)
        if as_json:
            write_json(stdout, [asdict(row) for row in outcome.rows], meta)
        else:
            table_console(stdout).print(tables.serve_table(outcome.rows, meta))


def _count_costs(wanted: list[CostSettings], as_json: bool) -> None:
    from ascend_plugin.bench.npu_cost import runner

    with (
        clean_stdout() as stdout,
        tempfile.TemporaryDirectory(prefix="ascend-plugin-bench-") as folder,
    ):
        load = machine.load_average()
        with progress() as report:
            outcome = runner.run(wanted, Path(folder), report)
        meta = machine.describe(1, None, load) | outcome.method
        if as_json:
            kernels = [asdict(row) for row in outcome.kernels]
            write_json(stdout, [asdict(row) for row in outcome.rows], meta, kernels=kernels)
        else:
            from ascend_plugin.cli import tables

            console = table_console(stdout)
            console.print(tables.cost_table(outcome.rows, meta))
            if outcome.kernels:
                console.print()
                console.print(tables.kernel_table(outcome.kernels, meta))


def _load_average() -> float:
    """Return the load before a measurement, with a remark on stderr when it is high."""
    load = machine.load_average()
    busy = machine.busy_remark(load)
    if busy:
        remark(f"Note: {busy}")
    return load
