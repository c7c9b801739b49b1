"""What the driver asks a worker, one JSON object per line each way."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal, get_args

#: How engines execute a step: as each does without flags, both without torch.compile
#: (``--enforce-eager``), or both with it.
Execution = Literal["default", "eager", "compile"]
EXECUTIONS: tuple[Execution, ...] = get_args(Execution)


@dataclass(frozen=True, slots=True)
class Load:
    """Start an engine; answered with what really runs.

    Attributes:
        model: folder.
        load_format: vLLM's.
        dtype: vLLM's name of the element type.
        execution: what the flags ask for.
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
    execution: Execution
    max_model_len: int
    max_num_seqs: int
    max_num_batched_tokens: int
    kv_cache_bytes: int
    kv_cache_dtype: str = "auto"
    additional_config: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class LoadGguf:
    """Start llama.cpp on a GGUF file; answered with what really runs.

    Attributes:
        path: of the file.
        vocabulary: token ids that the prompts are drawn from.
        threads: for prompts and for decode steps.
        max_model_len: longest sequence.
        max_num_seqs: sequences of a step.
        max_num_batched_tokens: tokens of a call: longer prompts come in chunks.
    """

    path: str
    vocabulary: int
    threads: int
    max_model_len: int
    max_num_seqs: int
    max_num_batched_tokens: int


@dataclass(frozen=True, slots=True)
class Loaded:
    """What runs in a worker.

    Attributes:
        platform: class that vLLM chose, or the version of llama.cpp's bindings.
        attention: attention backends of the layers.
        execution: how it executes a step.
        kernels: instruction set of the plugin's native kernels, or all that llama.cpp says of its
            own; None: vLLM's, or plain torch.
        threads: of torch, or of llama.cpp.
        seconds: time to start.
        load_seconds: of it, to load the weights; None, as below: not measured.
        resident_bytes: memory that the weights take.
        checkpoint_bytes: of the tensors in the checkpoint.
    """

    platform: str
    attention: list[str]
    execution: str
    kernels: str | None
    threads: int
    seconds: float
    load_seconds: float | None = None
    resident_bytes: int | None = None
    checkpoint_bytes: int | None = None


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
    """The end of a case.

    Attributes:
        tokens: every request's output.
        note: what did not run as ``Loaded`` said; None: all did.
    """

    tokens: list[list[int]]
    note: str | None = None


Command = Load | LoadGguf | Prefill | Decode | Finish
Answer = Loaded | Prefilled | Decoded | Finished

COMMANDS: dict[str, type[Command]] = {
    kind.__name__: kind for kind in (Load, LoadGguf, Prefill, Decode, Finish)
}
