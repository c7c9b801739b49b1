"""Options of ``quantize``, ``convert`` and ``eval weights``: names, help and shown defaults."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

Recipe = Annotated[
    Path,
    typer.Option(
        "--recipe",
        metavar="FILE|NAME",
        readable=False,
        help="YAML file, or the name of one in configs/quant, for example w8a8-rtn.",
    ),
]
Texts = Annotated[
    list[Path] | None,
    typer.Option(
        "--text", metavar="FILE", readable=False, help="UTF-8 prose to calibrate on; repeatable."
    ),
]
Output = Annotated[
    Path, typer.Option("--output", "-o", metavar="DIR", help="Folder of the checkpoint to make.")
]
Format = Annotated[
    str | None,
    typer.Option(
        metavar="compressed-tensors|modelslim",
        help="What to write; another than the tool's own is converted.",
        show_default="the tool's own",
    ),
]
WantedFormat = Annotated[
    str, typer.Option("--format", metavar="compressed-tensors|modelslim", help="What to write.")
]
Ignore = Annotated[
    list[Path] | None,
    typer.Option(
        metavar="FILE",
        readable=False,
        help="List of modules that stay float, beside the recipe's: one in a line; repeatable.",
    ),
]
Restart = Annotated[bool, typer.Option("--restart", help="Forget what an interrupted run left.")]
Checkpoint = Annotated[
    Path,
    typer.Argument(metavar="CHECKPOINT", readable=False, help="Folder of a quantised checkpoint."),
]
Models = Annotated[
    list[Path],
    typer.Argument(
        metavar="BASE CHECKPOINT...",
        readable=False,
        help="Folder of the float model, then those of checkpoints made from it.",
    ),
]
EvalDtype = Annotated[
    str,
    typer.Option(
        metavar="auto|bfloat16|float16|float32",
        help="What the models compute in; the rounding of bfloat16 hides part of the cost.",
    ),
]
