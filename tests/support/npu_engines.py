"""Engines on an NPU for tests: tiny models, settings, and how answers are compared."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from engines import Output

from ascend_plugin.model.tiny import write_tiny_llama

#: The CPU fallback on a machine that has an NPU, or simulates one.
CPU = {"ASCEND_PLUGIN_DEVICE": "cpu", "TORCH_DEVICE_BACKEND_AUTOLOAD": "0"}

#: Logprobs in bfloat16 move by steps of this size; choices that are closer are no mistakes.
NEAR_TIE = 0.07

#: The sizes that are captured: some batches are padded.
CAPTURED = [1, 2, 4, 8]

#: Compilation settings of the graph modes.
GRAPHS: dict[str, dict[str, Any]] = {
    "eager": {"enforce_eager": True},
    "full": {
        "compilation_config": {
            "mode": 0,
            "cudagraph_mode": "FULL_DECODE_ONLY",
            "cudagraph_capture_sizes": CAPTURED,
        }
    },
    "piecewise": {
        "compilation_config": {
            "cudagraph_mode": "PIECEWISE",
            "cudagraph_capture_sizes": CAPTURED,
        }
    },
    "full and piecewise": {
        "compilation_config": {
            "cudagraph_mode": "FULL_AND_PIECEWISE",
            "cudagraph_capture_sizes": CAPTURED,
        }
    },
}


class NPUModels:
    """Random bfloat16 models of the shapes that the operators want, written when asked for."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def __call__(self, name: str, **arguments: Any) -> str:
        path = self._folder / name
        if not path.exists():
            shape: dict[str, Any] = {"architecture": "qwen3", "head_dim": 128, "kv_heads": 2}
            write_tiny_llama(path, dtype="bfloat16", **{**shape, **arguments})
        return str(path)


def settings(model: str, graphs: str = "eager", **more: Any) -> dict[str, Any]:
    """An engine whose prompts are prefilled in chunks of at most 96 tokens.

    Every step makes as many drafts as asked for, unless a test says otherwise, on a CPU too.
    """
    config = dict(more.pop("additional_config", {}))
    config["speculation"] = {"adaptive": False, **config.get("speculation", {})}
    return {
        "model": model,
        "dtype": "bfloat16",
        "skip_tokenizer_init": True,
        "max_model_len": 1024,
        "max_num_batched_tokens": 96,
        "max_num_seqs": 8,
        "kv_cache_memory_bytes": 1 << 26,
        "additional_config": config,
        **GRAPHS[graphs],
        **more,
    }


def on_the_cpu(engine: dict[str, Any]) -> dict[str, Any]:
    """The same engine for the CPU platform, which captures no graphs."""
    plain = {name: value for name, value in engine.items() if name != "compilation_config"}
    return {**plain, "enforce_eager": True}


def assert_near(want: list[Output], got: list[Output], tie: float = NEAR_TIE) -> int:
    """Every token equal up to the first near-tie of a completion; return how many were equal."""
    assert len(want) == len(got)
    equal = 0
    for i, (left, right) in enumerate(zip(want, got, strict=True)):
        pairs = zip(left.tokens, right.tokens, strict=True)
        step = next((step for step, (a, b) in enumerate(pairs) if a != b), None)
        if step is None:
            equal += 1
            continue
        margins = (left.margins[step], right.margins[step])
        assert min(margins) <= tie, f"completion {i} differs at {step}, margins {margins}"
    return equal


def assert_identical(want: list[Output], got: list[Output]) -> None:
    """Every token equal, and every logprob."""
    assert [output.tokens for output in want] == [output.tokens for output in got]
    assert [output.logprobs for output in want] == [output.logprobs for output in got]
