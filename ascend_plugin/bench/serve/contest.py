"""Who runs against whom in ``bench serve``: a model of ours, stock vLLM's, a peer's file."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from ascend_plugin.bench import machine
from ascend_plugin.bench.errors import BenchError
from ascend_plugin.bench.serve.driver import LLAMA_CPP, OURS, STOCK, ContenderSpec
from ascend_plugin.bench.serve.models import ServeModel, Weights, resolve_model
from ascend_plugin.bench.serve.settings import Settings

Peer = Literal["llama.cpp"]

_BLOCK = 128
#: Beside weights and cache: torch, vLLM and the activations of a step.
_PROCESS_BYTES = 2 * 2**30
#: The same of llama.cpp, with the logits of a step.
_PEER_BYTES = 2**30


@dataclass(frozen=True, slots=True)
class Contest:
    """What the contenders serve.

    Attributes:
        ours: the plugin's model.
        stock: stock vLLM's; None: it does not run.
        gguf: llama.cpp's file; None: it does not run.
    """

    ours: ServeModel
    stock: ServeModel | None
    gguf: Path | None = None

    @property
    def specs(self) -> tuple[ContenderSpec, ...]:
        """Who runs, the plugin first."""
        runs = ((OURS, True), (STOCK, self.stock is not None), (LLAMA_CPP, self.gguf is not None))
        return tuple(spec for spec, does in runs if does)

    @property
    def same_weights(self) -> bool:
        """Whether stock vLLM serves our model's weights."""
        return self.stock is not None and self.stock.path == self.ours.path

    def checkpoints(self) -> dict[str, str | None]:
        """Return what each contender serves, for ``meta``; None: it does not run."""
        return {
            OURS.name: self.ours.described,
            STOCK.name: None if self.stock is None else self.stock.described,
            LLAMA_CPP.name: None if self.gguf is None else str(self.gguf),
        }


@dataclass(frozen=True, slots=True)
class Entrants:
    """Options that say who runs.

    Attributes:
        models: names or folders.
        weights: of drawn models, the plugin's.
        stock: whether stock vLLM runs.
        stock_model: what it serves instead of the model.
        peer: whom else to run.
        gguf: what the peer serves.
    """

    models: Sequence[str]
    weights: Weights = "bf16"
    stock: bool = True
    stock_model: str | None = None
    peer: Peer | None = None
    gguf: Path | None = None

    def __post_init__(self) -> None:
        """Refuse what does not go together.

        Raises:
            BenchError: options contradict each other, or the peer cannot run.
        """
        if self.stock_model is not None and not self.stock:
            raise BenchError("--stock-model is of no use to --no-stock; leave one of them out.")
        alone = "--stock-model" if self.stock_model is not None else self.peer and "--peer"
        if alone and len(self.models) != 1:
            raise BenchError(
                f"{alone} is compared with one --model, and there are {len(self.models)}: "
                f"{', '.join(self.models)}. Choose one with --model."
            )
        if (self.peer is None) != (self.gguf is None):
            raise BenchError(
                f"--gguf {self.gguf} is for --peer llama.cpp, which is missing."
                if self.peer is None
                else f"--peer {self.peer} needs --gguf FILE, the model as llama.cpp reads it."
            )
        if self.gguf is not None:
            _require_llama_cpp(self.gguf)


def make_contests(entrants: Entrants, scratch: Path) -> list[Contest]:
    """Return the contests, one per model.

    Args:
        entrants: who runs.
        scratch: folder for models whose weights are drawn.

    Raises:
        BenchError: there is no such model, or the contenders do not know the same tokens.
    """
    contests = []
    for name in entrants.models:
        ours = resolve_model(name, scratch, weights=entrants.weights)
        stock = None
        if entrants.stock_model is not None:
            stock = resolve_model(entrants.stock_model, scratch, option="--stock-model")
            if stock.vocabulary != ours.vocabulary:
                raise BenchError(
                    f"--stock-model {stock.name} has {stock.vocabulary} token ids and --model "
                    f"{ours.name} has {ours.vocabulary}: choose the same model with other weights."
                )
        elif entrants.stock:
            # vLLM has the bfloat16 model of the same shape where ours has drawn integers.
            stock = resolve_model(name, scratch)
        contests.append(Contest(ours, stock, entrants.gguf))
    return contests


def cache_bytes(model: ServeModel, settings: Settings) -> int:
    """Return the cache that holds every request to its end, with some blocks to spare."""
    blocks = settings.max_batch * (-(-settings.max_length // _BLOCK) + 1) + 8
    return blocks * _BLOCK * model.token_bytes(settings.element)


def require_fit(contest: Contest, settings: Settings) -> None:
    """Refuse contexts that a model does not have, and engines that memory does not hold.

    Raises:
        BenchError: one of both.
    """
    models = [model for model in (contest.ours, contest.stock) if model is not None]
    for model in models:
        _require_positions(model, settings)
    needed = sum(
        model.weight_bytes(settings.element) + cache_bytes(model, settings) + _PROCESS_BYTES
        for model in models
    )
    if contest.gguf is not None:
        needed += contest.gguf.stat().st_size + cache_bytes(contest.ours, settings) + _PEER_BYTES
    available = machine.available_memory()
    if available is not None and needed > available:
        raise BenchError(
            f"{len(contest.specs)} engines of {contest.ours.name} need about "
            f"{needed / 2**30:.1f} GiB of memory and {available / 2**30:.1f} GiB are available. "
            "Lower --batch or --context, or choose a smaller --model."
        )


def _require_positions(model: ServeModel, settings: Settings) -> None:
    for context in settings.contexts:
        new = settings.max_tokens(settings.max_batch, context)
        if context + new > model.max_positions:
            raise BenchError(
                f"--context {context} with {new} new tokens exceeds the {model.max_positions} "
                f"positions of {model.name}. Lower --context, --new-tokens or --rounds."
            )


def _require_llama_cpp(gguf: Path) -> None:
    if not gguf.is_file():
        raise BenchError(f"--gguf {gguf} is not a file; give the path of a model in GGUF.")
    if importlib.util.find_spec("llama_cpp") is None:
        raise BenchError(
            "--peer llama.cpp needs llama-cpp-python, which is not installed. Run: "
            "pip install llama-cpp-python"
        )
