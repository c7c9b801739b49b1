"""Options of ``ascend-plugin mtp``: names, help and shown defaults."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

Model = Annotated[
    Path,
    typer.Argument(
        metavar="MODEL",
        readable=False,
        help="Folder of a Hugging Face checkpoint: dense, like Llama, Mistral or Qwen2.",
    ),
]
Served = Annotated[
    Path,
    typer.Argument(
        metavar="MODEL", readable=False, help="Folder of a checkpoint with an MTP layer."
    ),
]
AnyModel = Annotated[
    Path,
    typer.Argument(
        metavar="MODEL", readable=False, help="Folder of a checkpoint with a tokenizer."
    ),
]
HeadTexts = Annotated[
    list[Path],
    typer.Option(
        "--text",
        metavar="FILE",
        readable=False,
        help="UTF-8 text like what will be generated; repeatable.",
    ),
]
HeadFile = Annotated[
    Path, typer.Option("--output", "-o", metavar="FILE", help="File to write, a .safetensors.")
]
Layer = Annotated[
    Path,
    typer.Argument(
        metavar="LAYER", readable=False, help="The layer.safetensors that 'mtp train' made."
    ),
]
Texts = Annotated[
    list[Path],
    typer.Option("--data", metavar="FILE", readable=False, help="UTF-8 prose; repeatable."),
]
Output = Annotated[Path, typer.Option("--output", "-o", metavar="DIR", help="Folder to make.")]
StartFrom = Annotated[
    Path | None,
    typer.Option(
        metavar="LAYER",
        readable=False,
        help="A layer.safetensors of this model to begin with.",
        show_default="the model's last layer",
    ),
]
Work = Annotated[
    Path | None,
    typer.Option(
        metavar="DIR",
        help="Samples, hidden states and the state of training; can be deleted afterwards.",
        show_default="OUTPUT.work",
    ),
]
Answers = Annotated[int, typer.Option(help="Answers of the model itself to learn from.")]
HeldOut = Annotated[int, typer.Option(help="Greedy answers to validate with.")]
AnswerTokens = Annotated[int, typer.Option(help="Tokens of an answer at most.")]
Prose = Annotated[
    float, typer.Option(help="Share of answers that continue paragraphs of --data; others chat.")
]
TextTokens = Annotated[int, typer.Option(help="Tokens of --data itself to learn from.")]
Minutes = Annotated[float, typer.Option(help="Time to train, interruptions not counted.")]
Epochs = Annotated[int, typer.Option(help="Passes over everything at most.")]
Patience = Annotated[int, typer.Option(help="Validations without a new best that end training.")]
BatchTokens = Annotated[int, typer.Option(help="Tokens of a training step.")]
Seed = Annotated[int, typer.Option(help="Of prompts, draws and the order of training.")]
Device = Annotated[str, typer.Option(help="Where the base is read and the layer trained.")]
Threads = Annotated[int | None, typer.Option(help="Threads of torch.", show_default="all CPUs")]
Restart = Annotated[bool, typer.Option("--restart", help="Delete the folder of work first.")]
Plot = Annotated[
    Path | None, typer.Option(metavar="FILE", help="Draw loss and acceptance, as .png or .svg.")
]
Prompts = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE",
        readable=False,
        help="Prompts as JSON lines, from 'mtp train'.",
        show_default="prompts.jsonl in MODEL or beside it",
    ),
]
Drafts = Annotated[int, typer.Option(help="Drafts of a proposal: num_speculative_tokens.")]
Tokens = Annotated[int, typer.Option(help="Tokens to generate per prompt at most.")]
SpeedPrompts = Annotated[
    int, typer.Option(help="Prompts that are timed one by one, and groups of 8; 0: none.")
]
Rounds = Annotated[int, typer.Option(help="Timed runs of each engine, in turn.")]
Dtype = Annotated[
    str,
    typer.Option(metavar="auto|bfloat16|float16|float32", help="What the model computes in."),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object: rows and meta.")]
