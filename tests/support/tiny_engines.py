"""Engines on tiny random models: how they are set up, and what must serve them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from engines import Answer

from ascend_plugin.model.tiny import write_tiny_llama


class TinyModels:
    """Random float32 models, written when first asked for."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def __call__(self, name: str, **arguments: Any) -> str:
        path = self._folder / name
        if not path.exists():
            write_tiny_llama(path, dtype="float32", **{"head_dim": 64, **arguments})
        return str(path)


def settings(model: str, **more: Any) -> dict[str, Any]:
    """A float32 engine whose prompts are prefilled in chunks of at most 96 tokens.

    The plugin records its decode steps and repeats them; stock vLLM runs operator by operator.
    Every step makes as many drafts as asked for, unless a test says otherwise: tests count them.
    """
    config = dict(more.pop("additional_config", {}))
    config["speculation"] = {"adaptive": False, **config.get("speculation", {})}
    return {
        "model": model,
        "dtype": "float32",
        "skip_tokenizer_init": True,
        "compilation_config": {"mode": 0},
        "max_model_len": 4096,
        "max_num_batched_tokens": 96,
        "max_num_seqs": 24,
        "kv_cache_memory_bytes": 1 << 28,
        "additional_config": config,
        **more,
    }


def assert_is_plugin(
    answer: Answer,
    block_size: int = 128,
    implementation: str = "native",
    *,
    compiled: bool = False,
) -> None:
    """The plugin's platform, worker, attention and operators served the job.

    Layers without quantisation are Inductor's own where it compiles the model.
    """
    made_of = dict(answer.made_of)
    served = made_of.pop("implementations")
    assert served["kv_cache_write"] == served["paged_attention"] == [implementation]
    assert served.get("dense_matmul", []) == ([] if compiled else [implementation])
    made_of.pop("num_blocks")
    assert made_of == {
        "platform": "AscendCPUPlatform",
        "worker": "AscendCPUWorker",
        "backends": ["AscendCPUAttentionBackend"],
        "block_sizes": [block_size],
        "dtypes": ["torch.float32"],
        "batched_tokens": 96,
    }


def write_bloom(path: Path) -> str:
    """Write a tiny random model with ALiBi."""
    from transformers import BloomConfig, BloomForCausalLM

    torch.manual_seed(0)
    shape = {"vocab_size": 256, "hidden_size": 128, "n_layer": 2, "n_head": 4}
    BloomForCausalLM(BloomConfig(**shape, initializer_range=0.25)).save_pretrained(path)
    return str(path)
