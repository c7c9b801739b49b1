"""``ascend-plugin mtp``: trains, joins and evaluates draft layers."""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from ascend_plugin.bench import machine
from ascend_plugin.cli import mtp_options as options
from ascend_plugin.cli.output import clean_stdout, remark, table_console, write_json
from ascend_plugin.cli.progress import progress_bar
from ascend_plugin.kv_eval.checks import check_positive, use_threads
from ascend_plugin.mtp.errors import MTPError

if TYPE_CHECKING:
    from ascend_plugin.mtp.run import TrainRequest, TrainResult

app = typer.Typer(no_args_is_help=True)


@app.callback()
def mtp() -> None:
    """Give a dense model a layer that drafts tokens, and measure what it is worth."""


@app.command()
def train(
    model: options.Model,
    data: options.Texts,
    output: options.Output,
    work: options.Work = None,
    start_from: options.StartFrom = None,
    answers: options.Answers = 2400,
    held_out: options.HeldOut = 200,
    answer_tokens: options.AnswerTokens = 192,
    prose: options.Prose = 0.35,
    text_tokens: options.TextTokens = 100_000,
    minutes: options.Minutes = 60.0,
    epochs: options.Epochs = 20,
    patience: options.Patience = 8,
    batch_tokens: options.BatchTokens = 4096,
    seed: options.Seed = 0,
    device: options.Device = "cpu",
    threads: options.Threads = None,
    restart: options.Restart = False,
    plot: options.Plot = None,
    as_json: options.AsJson = False,
) -> None:
    """Train a draft layer on the model's own answers and on text; the model itself stays frozen.

    The model is asked questions of its own and continues paragraphs of the text; its hidden states
    are kept on disk, and the layer learns its distribution of the token after the next. An
    interrupted run goes on where it stopped when it is repeated.
    """
    _check_positive(answers=answers, held_out=held_out, answer_tokens=answer_tokens)
    _check_positive(epochs=epochs, patience=patience, batch_tokens=batch_tokens)
    _check_share(prose, minutes)
    from ascend_plugin.kv_eval.text import read_texts
    from ascend_plugin.mtp.run import TrainRequest
    from ascend_plugin.mtp.sampling import SamplePlan
    from ascend_plugin.mtp.train import TrainPlan

    samples = SamplePlan(answers, held_out, answer_tokens, prose, seed=seed)
    training = TrainPlan(
        minutes, epochs=epochs, batch_tokens=batch_tokens, patience=patience, seed=seed
    )
    work = work or output.with_name(output.name + ".work")
    texts, used = read_texts(data), use_threads(threads)
    request = TrainRequest(
        model, texts, output, work, text_tokens, samples, training, start_from, used, device
    )
    _train(request, restart, plot, as_json)


@app.command()
def attach(model: options.Model, layer: options.Layer, output: options.Output) -> None:
    """Write a checkpoint that joins MODEL with a draft layer; MODEL's files are linked."""
    from ascend_plugin.mtp.checkpoint import attach as join

    join(model, layer, output)
    typer.echo(
        f"{output} has a draft layer. Serve it with: vllm serve {output} --speculative-config "
        '\'{"method": "mtp", "num_speculative_tokens": 2}\''
    )


@app.command()
def head(
    model: options.AnyModel,
    text: options.HeadTexts,
    output: options.HeadFile,
) -> None:
    """Count a text's tokens, for a draft head over the most frequent ones.

    A checkpoint of 'mtp train' knows its own; this is for models that bring their MTP layer.
    """
    from ascend_plugin.kv_eval.text import read_texts
    from ascend_plugin.mtp.head import write_head

    coverage = write_head(model, read_texts(text), output)
    told = ", ".join(f"{count} have {100 * share:.1f} %" for count, share in coverage.items())
    settings = {"speculation": {"draft_head": {"file": str(output)}}}
    typer.echo(
        f"{output} orders the tokens of {model}; of the text's tokens the first {told}. "
        f"Serve with: --additional-config '{json.dumps(settings)}'"
    )


@app.command("eval")
def evaluate(
    model: options.Served,
    prompts: options.Prompts = None,
    drafts: options.Drafts = 2,
    tokens: options.Tokens = 128,
    speed_prompts: options.SpeedPrompts = 16,
    rounds: options.Rounds = 3,
    dtype: options.Dtype = "auto",
    threads: options.Threads = None,
    as_json: options.AsJson = False,
) -> None:
    """Serve prompts in vLLM with and without drafts: acceptance, and speed in interleaved runs."""
    _check_positive(drafts=drafts, tokens=tokens, rounds=rounds)
    from ascend_plugin.mtp.evaluate import EvalRequest, check_model, read_prompts
    from ascend_plugin.mtp.evaluate import evaluate as run

    check_model(model)
    file = prompts or _prompts_of(model)
    given = read_prompts(file)
    load = machine.load_average()
    with clean_stdout() as stdout:
        used = use_threads(threads)
        stop = _stop_ids(model)
        request = EvalRequest(
            model, given, stop, drafts, tokens, speed_prompts, rounds, dtype, used
        )
        with progress_bar() as report:
            result = run(request, report)
        if remarked := machine.busy_remark(load):
            remark(f"Note: {remarked}")
        meta = machine.describe(used, None, load) | {
            "model": model.resolve().name,
            "prompts": len(given),
            "drafts": drafts,
            "tokens": tokens,
            "rounds": rounds,
            "dtype": dtype,
            "speculation": result.speculation,
        }
        if as_json:
            row = {k: v for k, v in asdict(result).items() if k != "speculation"}
            write_json(stdout, [row], meta)
        else:
            from ascend_plugin.cli.tables import mtp_table

            table_console(stdout).print(mtp_table(result, meta))


def _train(request: TrainRequest, restart: bool, plot: Path | None, as_json: bool) -> None:
    """Run ``mtp train`` with options that are in order."""
    from ascend_plugin.mtp.run import run

    if plot:
        from ascend_plugin.bench.plot_path import check_plot_path

        check_plot_path(plot)
    if restart:
        shutil.rmtree(request.work, ignore_errors=True)
    load = machine.load_average()
    with clean_stdout() as stdout:
        with progress_bar() as report:
            result = run(request, report)
        if plot:
            from ascend_plugin.mtp.plot import plot as draw

            draw(result.course, f"{request.model.resolve().name}, {request.device}", plot)
        meta = machine.describe(request.threads, None, load) | {
            "samples": asdict(request.samples),
            "training": asdict(request.training),
        }
        if as_json:
            write_json(stdout, [_row(result)], meta)
        else:
            stdout.write(_told(result))


def _check_positive(**options: int) -> None:
    for name, value in options.items():
        check_positive("--" + name.replace("_", "-"), value)


def _check_share(prose: float, minutes: float) -> None:
    if not 0 <= prose <= 1:
        raise MTPError(f"--prose {prose} is not possible; it is a share from 0 to 1.")
    if not minutes > 0:
        raise MTPError(f"--minutes {minutes} is not possible; it must be more than 0.")


def _prompts_of(model: Path) -> Path:
    """Return the prompts that belong to a checkpoint."""
    places = [folder / "prompts.jsonl" for folder in (model, model.resolve().parent)]
    for place in places:
        if place.is_file():
            return place
    raise MTPError(
        f"there is no prompts.jsonl in {model} or beside it. Name a file with --prompts."
    )


def _stop_ids(model: Path) -> list[int]:
    from ascend_plugin.mtp.base import read_config

    ids = read_config(model).get("eos_token_id")
    return [] if ids is None else ids if isinstance(ids, list) else [ids]


def _row(result: TrainResult) -> dict[str, object]:
    return {
        "layer": str(result.layer),
        "checkpoint": str(result.checkpoint),
        "learnt": result.learnt,
        "held_out": result.held_out,
        "coverage": result.coverage,
        **asdict(result.course),
    }


def _told(result: TrainResult) -> str:
    best = result.course.best()
    assert best is not None
    rates = ", ".join(f"{100 * rate:.1f} %" for rate in best.acceptance)
    return (
        f"{result.layer} is the draft layer, {result.checkpoint} a checkpoint with it.\n"
        f"Held-out answers: {rates} of the first, second and third drafts were right, each given "
        "that those before it were.\n"
    )
