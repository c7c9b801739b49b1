"""``ascend-plugin calibrate``: makes files that an int8 KV cache needs."""

from __future__ import annotations

from dataclasses import asdict

import typer

from ascend_plugin.bench import machine
from ascend_plugin.cli import kv_options as options
from ascend_plugin.cli.output import clean_stdout, remark, table_console, write_json
from ascend_plugin.cli.progress import progress_bar
from ascend_plugin.kv_eval.checks import check_positive, use_threads

app = typer.Typer(no_args_is_help=True)


@app.callback()
def calibrate() -> None:
    """Make the files that quantised serving needs."""


@app.command()
def kv(
    model: options.Model,
    text: options.Texts,
    output: options.Output,
    tokens: options.CalibrationTokens = 32768,
    context: options.Context = 2048,
    chat: options.Chat = None,
    dtype: options.CalibrationDtype = "auto",
    threads: options.Threads = None,
    restart: options.Restart = False,
    as_json: options.AsJson = False,
) -> None:
    """Find static scales for the KV cache variants c8s and c8p.

    Reads every text twice: for the largest value of each channel, and for the mean error under the
    scales that follow from it. An interrupted run goes on where it stopped when it is repeated.
    """
    check_positive("--tokens", tokens)
    from ascend_plugin.kv_eval.text import read_texts

    texts = read_texts(text)
    load = machine.load_average()
    with clean_stdout() as stdout:
        used = use_threads(threads)
        from ascend_plugin.kv_eval import calibrate as work
        from ascend_plugin.kv_eval.model import CausalModel
        from ascend_plugin.kv_eval.state import StateFile
        from ascend_plugin.kv_eval.text import calibration_windows, text_digest

        with progress_bar() as report:
            report("loading the model", 0, 1)
            subject = CausalModel(model, dtype)
            subject.check_context(context)
            windows = calibration_windows(texts, subject.tokenizer, context, tokens, chat)
            about = work.describe(subject, windows, text_digest(texts))
            state = StateFile(output, about)
            if restart:
                state.remove()
            rows = work.calibrate_into(output, subject, windows, about, state, report)
        if windows.tokens < tokens:
            remark(f"Note: the text has {windows.tokens} tokens in whole windows, not {tokens}.")
        meta = machine.describe(used, None, load) | about
        if as_json:
            write_json(stdout, [asdict(row) for row in rows], meta)
        else:
            from ascend_plugin.cli.kv_tables import calibration_table

            table_console(stdout).print(calibration_table(rows, meta))
            stdout.write(f"{output} holds the scales of {len(rows)} layers.\n")
