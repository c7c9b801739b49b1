"""Options of ``ascend-plugin bench``: names, help and shown defaults."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from ascend_plugin.bench.npu_cost.models import GEOMETRIES
from ascend_plugin.bench.npu_cost.settings import GRAPHS
from ascend_plugin.bench.npu_cost.settings import VARIANTS as COST_VARIANTS
from ascend_plugin.bench.serve.contest import Peer
from ascend_plugin.bench.serve.models import Weights

AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object: rows and meta.")]
Threads = Annotated[
    int | None, typer.Option(help="Threads of each contender.", show_default="all CPUs")
]

Phases = Annotated[
    list[str] | None,
    typer.Option(metavar="decode|prefill|write", help="Repeatable.", show_default="all"),
]
Variants = Annotated[
    list[str] | None,
    typer.Option(
        metavar="bf16|fp16|fp32|c8d|c8s|c8p|c8d-fast|…",
        help="Element type, or int8 pages (queries and vLLM's cache are bf16 then; -fast: 8-bit "
        "products); repeatable.",
        show_default="bf16",
    ),
]
AttentionBatches = Annotated[
    list[int] | None,
    typer.Option(
        help="Sequences per call (write: tokens per call); repeatable.",
        show_default="decode 1 and 8, prefill 1, write 8 and 2048",
    ),
]
AttentionContexts = Annotated[
    list[int] | None,
    typer.Option(
        help="Tokens per sequence, new ones included (write: tokens a cache holds); repeatable.",
        show_default="8192; prefill: as many as new tokens",
    ),
]
PrefillTokens = Annotated[int, typer.Option(help="New tokens per sequence of a prefill.")]
Heads = Annotated[int, typer.Option(help="Query heads.")]
KVHeads = Annotated[int, typer.Option(help="Key/value heads.")]
HeadDim = Annotated[int, typer.Option(help="Elements per head.")]
BlockSize = Annotated[int, typer.Option(help="Tokens in a block of the cache.")]
Implementation = Annotated[
    Literal["native", "reference"] | None,
    typer.Option(help="The plugin's implementation.", show_default="what the engine uses"),
]
Isa = Annotated[
    Literal["avx512", "avx2", "portable"] | None,
    typer.Option(help="Instruction set of the native kernels.", show_default="the best"),
]
Seconds = Annotated[float, typer.Option(help="Time to measure each case.")]
Plot = Annotated[
    Path | None, typer.Option(metavar="FILE", help="Draw the result, as .png or .svg.")
]

LinearSchemes = Annotated[
    list[str] | None,
    typer.Option(
        "--scheme",
        metavar="w4a16|w4a16-zp|w8a16|w8a8|bf16",
        help="How weights (w) and activations (a) are held; -zp: zero points; bf16: not quantised. "
        "Repeatable.",
        show_default="w4a16",
    ),
]
LinearShapes = Annotated[
    list[str] | None,
    typer.Option(
        "--shape",
        metavar="NxK|smollm2|7b",
        help="Columns and inputs of the layer, or all layers of a model; repeatable.",
        show_default="4096x4096",
    ),
]
LinearRows = Annotated[
    list[int] | None,
    typer.Option(
        "--rows", "-m", help="Rows (tokens) of a call; repeatable.", show_default="1, 2, 4, 8, 512"
    ),
]
LinearGroup = Annotated[
    int, typer.Option(help="Inputs that share a scale; 0: one scale per column.")
]
LatentVariants = Annotated[
    list[str] | None,
    typer.Option(
        metavar="bf16|fp16|fp32|c8d|c8d-fast|c8s|c8s-fast",
        help="Element type, or int8 latents (queries and vLLM's cache are bf16 then; -fast: 8-bit "
        "products); repeatable.",
        show_default="bf16",
    ),
]
MlaBatches = Annotated[
    list[int] | None,
    typer.Option(help="Sequences per call; repeatable.", show_default="1 and 8"),
]
VerifiedTokens = Annotated[int, typer.Option(help="Query tokens per sequence.")]
LatentDim = Annotated[int, typer.Option(help="Elements of a latent (kv_lora_rank).")]
RotaryDim = Annotated[int, typer.Option(help="Elements of a rotary part (qk_rope_head_dim).")]

Models = Annotated[
    list[str] | None,
    typer.Option(
        metavar="DIR|smollm2|qwen3-28x1024",
        help="Folder with a checkpoint, or a known model; qwen3-28x1024 has random weights. "
        "Repeatable.",
        show_default="both known models",
    ),
]
ServeBatches = Annotated[
    list[int] | None, typer.Option(help="Requests at once; repeatable.", show_default="8")
]
ServeWeights = Annotated[
    Weights, typer.Option(help="The plugin's weights of qwen3-28x1024; vLLM's stay bf16.")
]
StockModel = Annotated[
    str | None,
    typer.Option(
        metavar="DIR|NAME",
        help="What vLLM serves, such as the bf16 checkpoint of a quantised --model.",
        show_default="the --model",
    ),
]
Stock = Annotated[bool, typer.Option("--stock/--no-stock", help="Whether vLLM runs too.")]
ServePeer = Annotated[
    Peer | None,
    typer.Option("--peer", help="A third contender: llama.cpp, if llama-cpp-python is installed."),
]
Gguf = Annotated[Path | None, typer.Option(metavar="FILE", help="The model as llama.cpp reads it.")]
ServeContexts = Annotated[
    list[int] | None,
    typer.Option(help="Tokens of a prompt; repeatable.", show_default="1536, 4096"),
]
DecodeSteps = Annotated[int, typer.Option(help="Decode steps of a round.")]
Rounds = Annotated[int, typer.Option(help="Decode rounds of each contender.")]
ServeVariant = Annotated[
    str,
    typer.Option(
        metavar="bf16|fp16|fp32|c8d|c8s|c8p|c8d-fast|…",
        help="Element type of weights and cache, or the plugin's int8 cache (weights and vLLM's "
        "cache are bf16 then).",
    ),
]
ServeScales = Annotated[
    Path | None,
    typer.Option(metavar="FILE", help="Static scales for c8s and c8p, of the one --model."),
]
Eager = Annotated[
    bool | None,
    typer.Option(
        "--eager/--compile",
        help="Both of vLLM's engines without or with torch.compile.",
        show_default="each as it runs without flags",
    ),
]

CostModel = Annotated[
    str,
    typer.Option(
        metavar="|".join(["DIR", *GEOMETRIES]),
        help="Folder with config.json, or a published shape; weights are random.",
    ),
]
CostVariants = Annotated[
    list[str] | None,
    typer.Option(
        metavar="|".join(COST_VARIANTS),
        help="How the cache is held; repeatable.",
        show_default="bf16",
    ),
]
CostBatch = Annotated[int, typer.Option(help="Sequences of the decode step.")]
CostContext = Annotated[int, typer.Option(help="Tokens of each sequence.")]
CostGraphs = Annotated[str, typer.Option(metavar="|".join(GRAPHS), help="What is captured.")]
CostDrafts = Annotated[
    int, typer.Option(help="Drafts that a verification step checks beside the new token.")
]
CostAcceptance = Annotated[
    float,
    typer.Option(
        help="How likely a draft is accepted if those before it were: assumed, for the launches "
        "per accepted token."
    ),
]
CostNaive = Annotated[
    bool, typer.Option("--naive/--no-naive", help="Count vLLM's own chain of operators too.")
]
CostSweep = Annotated[
    bool,
    typer.Option("--sweep", help="int8: launch the kernel of attention over a range of shapes."),
]
