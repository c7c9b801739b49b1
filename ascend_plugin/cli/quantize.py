"""``ascend-plugin quantize`` and ``convert``: make quantised checkpoints."""

from __future__ import annotations

import signal

from ascend_plugin.cli import weight_options as options
from ascend_plugin.cli.kv_options import Model
from ascend_plugin.cli.output import clean_stdout
from ascend_plugin.cli.progress import progress_bar


def quantize(
    model: Model,
    recipe: options.Recipe,
    output: options.Output,
    text: options.Texts = None,
    format: options.Format = None,
    ignore: options.Ignore = None,
    restart: options.Restart = False,
) -> None:
    """Quantise the weights of a model with the tool that a recipe names.

    The tool runs in an environment of its own, which is made when it is first needed. An
    interrupted run goes on after the last stage that was done when it is repeated.
    """
    from ascend_plugin.kv_eval.text import read_texts
    from ascend_plugin.weight_tools.quantize import QuantiseRequest, quantise
    from ascend_plugin.weight_tools.recipe import load_recipe

    chosen = load_recipe(recipe, ignore or ())
    texts = read_texts(text or ())
    # Service managers send SIGTERM: end as for Ctrl-C, and take the running tool along.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    request = QuantiseRequest(model, chosen, recipe.stem, texts, output, format, restart)
    with clean_stdout() as stdout:
        with progress_bar() as report:
            made = quantise(request, report)
        stdout.write(
            f"{output} holds {made['model']} quantised as {recipe.stem}. Look at it with "
            f"'ascend-plugin inspect {output}'.\n"
        )


def convert(
    checkpoint: options.Checkpoint,
    output: options.Output,
    format: options.WantedFormat,
) -> None:
    """Write a quantised checkpoint in another format, where the meaning is the same.

    Codes, scales and zero points are kept; what the format cannot say is refused.
    """
    from ascend_plugin.weight_tools.convert import convert_checkpoint

    with clean_stdout() as stdout:
        with progress_bar() as report:
            modules = convert_checkpoint(checkpoint, output, format, report)
        stdout.write(f"{output} holds {modules} quantised modules as {format}.\n")
