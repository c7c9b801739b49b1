"""What the driver asks a worker, one JSON object per line each way."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, slots=True)
class Load:
    """Start an engine; answered with what really runs.

    Attributes:
        model: folder.
        load_format: vLLM's.
        dtype: vLLM's name of the element type.
        eager: without torch.compile.
        max_model_len: longest sequence.
        max_num_seqs: sequences of a step.
        max_num_batched_tokens: tokens of a step: longer prompts are prefilled in chunks.
        kv_cache_bytes: size of the cache.
        kv_cache_dtype: vLLM's name of the cache's element type.
        additional_config: settings of the plugin.
    """

    model: str
    load_format: str
    dtype: str
    eager: bool
    max_model_len: int
    max_num_seqs: int
    max_num_batched_tokens: int
    kv_cache_bytes: int
    kv_cache_dtype: str = "auto"
    additional_config: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Loaded:
    """What runs in a worker.

    Attributes:
        platform: class that vLLM chose.
        attention: attention backends of the layers.
        kernels: instruction set of the plugin's native kernels; None: vLLM's, or plain torch.
        threads: of torch.
        seconds: time to start.
    """

    platform: str
    attention: list[str]
    kernels: str | None
    threads: int
    seconds: float


@dataclass(frozen=True, slots=True)
class Prefill:
    """Submit prompts together and run until each has its first token.

    Attributes:
        prompts: token ids.
        max_tokens: tokens per request before it ends; more than will be asked for.
    """

    prompts: list[list[int]]
    max_tokens: int


@dataclass(frozen=True, slots=True)
class Prefilled:
    """Attributes: ``first_token_s``: seconds from submission, per request."""

    first_token_s: list[float]


@dataclass(frozen=True, slots=True)
class Decode:
    """Run ``steps`` steps; each gives every request one token."""

    steps: int


@dataclass(frozen=True, slots=True)
class Decoded:
    """Attributes: ``seconds``: time of all steps."""

    seconds: float


@dataclass(frozen=True, slots=True)
class Finish:
    """End all requests."""


@dataclass(frozen=True, slots=True)
class Finished:
    """Attributes: ``tokens``: every request's output."""

    tokens: list[list[int]]


Command = Load | Prefill | Decode | Finish
Answer = Loaded | Prefilled | Decoded | Finished

COMMANDS: dict[str, type[Command]] = {
    kind.__name__: kind for kind in (Load, Prefill, Decode, Finish)
}
