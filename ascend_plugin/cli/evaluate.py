"""``ascend-plugin eval``: what quantised weights and caches cost in accuracy."""

from __future__ import annotations

from dataclasses import asdict

import typer

from ascend_plugin.bench import machine
from ascend_plugin.cli import kv_options as options
from ascend_plugin.cli import weight_options
from ascend_plugin.cli.output import clean_stdout, table_console, write_json
from ascend_plugin.cli.progress import progress_bar
from ascend_plugin.kv_eval.checks import check_positive, check_threshold, use_threads

app = typer.Typer(no_args_is_help=True)


@app.callback()
def evaluate() -> None:
    """Measure what quantisation does to a model's answers."""


@app.command()
def kv(
    model: options.Model,
    text: options.Texts,
    variants: options.Variants = None,
    scales: options.Scales = None,
    threshold: options.Threshold = None,
    tokens: options.EvalTokens = 16384,
    context: options.Context = 2048,
    dtype: options.EvalDtype = "float32",
    threads: options.Threads = None,
    plot: options.Plot = None,
    as_json: options.AsJson = False,
) -> None:
    """Compare variants of the KV cache with bf16 pages: predictions, attention, rows, per layer.

    Attention runs on the plugin's operators over its pages; the rest of the model in transformers.
    """
    check_positive("--tokens", tokens)
    check_threshold(threshold)
    if plot:
        from ascend_plugin.bench.plot_path import check_plot_path

        check_plot_path(plot)
    from ascend_plugin.kv_eval.text import read_texts

    texts = read_texts(text)
    load = machine.load_average()
    with clean_stdout() as stdout:
        used = use_threads(threads)
        from ascend_plugin.kv_eval.run import EvalRequest, run
        from ascend_plugin.kv_eval.variants import choose_variants

        chosen = choose_variants(variants or (), with_scales=scales is not None)
        request = EvalRequest(model, texts, chosen, scales, threshold, tokens, context, dtype)
        with progress_bar() as report:
            outcome, method = run(request, report)
        meta = machine.describe(used, _isa(), load) | method
        if plot:
            from ascend_plugin.kv_eval.plot import plot as draw

            draw(outcome.layers, f"{method['model']}, {method['tokens']} tokens", plot)
        if as_json:
            layers = [asdict(row) for row in outcome.layers]
            write_json(stdout, [asdict(row) for row in outcome.rows], meta | {"layers": layers})
        else:
            from ascend_plugin.cli.kv_tables import eval_table

            table_console(stdout).print(eval_table(outcome.rows, meta))


@app.command("kv-synthetic")
def kv_synthetic(
    rounds: options.Rounds = 4,
    seed: options.Seed = 0,
    threads: options.Threads = None,
    as_json: options.AsJson = False,
) -> None:
    """Show where variants break: outlier channels, attention sinks, heavy tails, strangers.

    One attention layer with drawn queries, keys and values; needs no model.
    """
    check_positive("--rounds", rounds)
    load = machine.load_average()
    with clean_stdout() as stdout:
        used = use_threads(threads)
        from ascend_plugin.kv_eval import synthetic

        with progress_bar() as report:
            rows = synthetic.run_cases(rounds, seed, report)
        meta = machine.describe(used, _isa(), load) | synthetic.method(rounds, seed)
        if as_json:
            write_json(stdout, [synthetic.as_dict(row) for row in rows], meta)
        else:
            from ascend_plugin.cli.kv_tables import synthetic_table

            table_console(stdout).print(synthetic_table(rows))


@app.command()
def weights(
    models: weight_options.Models,
    text: options.Texts,
    tokens: options.EvalTokens = 16384,
    context: options.Context = 2048,
    dtype: weight_options.EvalDtype = "float32",
    threads: options.Threads = None,
    plot: options.Plot = None,
    as_json: options.AsJson = False,
) -> None:
    """Compare quantised checkpoints with the float model: predictions, size, error per layer.

    Computes what the checkpoints mean, in transformers: the same on every device.
    """
    check_positive("--tokens", tokens)
    if plot:
        from ascend_plugin.bench.plot_path import check_plot_path

        check_plot_path(plot)
    from ascend_plugin.kv_eval.text import read_texts

    texts = read_texts(text)
    load = machine.load_average()
    with clean_stdout() as stdout:
        used = use_threads(threads)
        from ascend_plugin.weight_tools.evaluate import WeightRequest, evaluate_weights

        base, *checkpoints = models
        request = WeightRequest(base, checkpoints, texts, tokens, context, dtype)
        with progress_bar() as report:
            outcome = evaluate_weights(request, report)
        meta = machine.describe(used, None, load) | outcome.method
        if plot:
            from ascend_plugin.weight_tools.plot import plot as draw

            title = f"{meta['model']}, {meta['tokens']} tokens"
            draw(outcome.rows, outcome.layers, title, plot)
        if as_json:
            layers = [asdict(row) for row in outcome.layers]
            write_json(stdout, [asdict(row) for row in outcome.rows], meta | {"layers": layers})
        else:
            from ascend_plugin.cli.weight_tables import weight_table

            table_console(stdout).print(weight_table(outcome.rows, meta))


def _isa() -> str | None:
    from ascend_plugin.ops import native

    return native.load().isa if native.support().ok else None
