"""Options of ``ascend-plugin calibrate`` and ``eval``: names, help and shown defaults."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

Model = Annotated[
    Path,
    # readable=False: the command itself says what is wrong with a path, in one sentence.
    typer.Argument(metavar="MODEL", readable=False, help="Folder of a Hugging Face checkpoint."),
]
Texts = Annotated[
    list[Path],
    typer.Option("--text", metavar="FILE", readable=False, help="UTF-8 prose; repeatable."),
]
Output = Annotated[
    Path,
    typer.Option("--output", "-o", metavar="FILE", help="The scales file (safetensors) to make."),
]
CalibrationTokens = Annotated[
    int, typer.Option(help="Tokens to read, spread over the texts; all if they have fewer.")
]
Chat = Annotated[
    bool | None,
    typer.Option(
        "--chat/--no-chat",
        help="Put every fourth window into the form of the chat template: a chat server's static "
        "scales must know the template's tokens.",
        show_default="--chat if the tokenizer has a template",
    ),
]
EvalTokens = Annotated[int, typer.Option(help="Tokens to read, spread over the texts.")]
Context = Annotated[int, typer.Option(help="Tokens that the model reads at once.")]
_DTYPES = "auto|bfloat16|float16|float32"
CalibrationDtype = Annotated[
    str,
    typer.Option(metavar=_DTYPES, help="What the model computes in; auto: the checkpoint's own."),
]
EvalDtype = Annotated[
    str,
    typer.Option(
        metavar=_DTYPES,
        help="What the model computes in. In bfloat16 the rounding of everything else hides most "
        "of what a cache costs.",
    ),
]
Threads = Annotated[int | None, typer.Option(help="Threads of torch.", show_default="all CPUs")]
Restart = Annotated[
    bool, typer.Option("--restart", help="Forget what an interrupted calibration left.")
]
Variants = Annotated[
    list[str] | None,
    typer.Option(
        metavar="bf16|fp32|c8d|c8s|c8p-int4|c8p-e3m0",
        help="Repeatable, or with commas between; bf16 is always there.",
        show_default="all but fp32; without --scales bf16, c8d",
    ),
]
Scales = Annotated[
    Path | None,
    typer.Option(metavar="FILE", readable=False, help="Static scales from 'calibrate kv'."),
]
Threshold = Annotated[
    float | None,
    typer.Option(
        help="Relative error above which c8p patches a row.",
        show_default="3 times the calibrated mean of the layer",
    ),
]
Plot = Annotated[
    Path | None, typer.Option(metavar="FILE", help="Draw errors per layer, as .png or .svg.")
]
Rounds = Annotated[int, typer.Option(help="Sequences that each case evaluates.")]
Seed = Annotated[int, typer.Option(help="Of the random numbers.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object: rows and meta.")]
