"""Models with other attention than Llama's: equal to stock vLLM in float32."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from engines import EngineProcess, assert_same, first_differences
from prompts import mixed_prompts
from tiny_engines import TinyModels, assert_is_plugin, settings, write_bloom

pytestmark = pytest.mark.engine

RUN = {"prompts": mixed_prompts(longest=2000)[::2], "max_tokens": 16}

MODELS = {
    "qwen2": {"architecture": "qwen2", "head_dim": 32},
    "qwen3": {"architecture": "qwen3", "head_dim": 128},
    "every head its own keys": {"heads": 4, "kv_heads": 4, "head_dim": 80},
    "one head of keys": {"heads": 8, "kv_heads": 1, "head_dim": 32},
    "sliding window": {"architecture": "mistral", "sliding_window": 50},
    "soft cap and some windows": {
        "architecture": "gemma2",
        "sliding_window": 40,
        "attn_softcap": 3.0,
        "layers": 4,
        "head_dim": 256,
    },
}


@pytest.mark.parametrize("name", MODELS)
def test_as_stock(plugin: EngineProcess, stock: EngineProcess, tiny: TinyModels, name: str) -> None:
    model = tiny(name, **MODELS[name])
    answer = plugin.run(settings(model, block_size=64), RUN)
    assert_is_plugin(answer, block_size=64)
    assert_same(stock.run(settings(model), RUN).outputs(), answer.outputs())


def test_window_and_soft_cap_matter(plugin: EngineProcess, tiny: TinyModels) -> None:
    """Guards the test above: without window or soft cap the same weights say something else."""
    for name, without in (
        ("sliding window", {"sliding_window": None}),
        ("soft cap and some windows", {"attn_softcap": None}),
        ("soft cap and some windows", {"sliding_window": None}),
    ):
        key = ", ".join([name, "without", *without])
        plain = tiny(key, **{**MODELS[name], **without})
        theirs = plugin.run(settings(plain, block_size=64), RUN).outputs()
        ours = plugin.run(settings(tiny(name, **MODELS[name]), block_size=64), RUN).outputs()
        assert len(first_differences(theirs, ours)) > len(ours) // 3


def _write_gpt_oss(path: Path) -> str:
    """Write a tiny random model with attention sinks, and windows in every other layer."""
    from transformers import GptOssConfig, GptOssForCausalLM

    torch.manual_seed(0)
    shape = {
        "vocab_size": 256,
        "hidden_size": 128,
        "intermediate_size": 128,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "num_local_experts": 2,
        "num_experts_per_tok": 2,  # of two: no choice that rounding could change
        "sliding_window": 40,
        "pad_token_id": 1,
        "bos_token_id": 0,
        "eos_token_id": 1,
    }
    model = GptOssForCausalLM(GptOssConfig(**shape, initializer_range=0.15))
    for name, parameter in model.named_parameters():
        if name.endswith("sinks"):
            torch.nn.init.normal_(parameter, std=2.0)
    model.save_pretrained(path)
    return str(path)


SCORE = {"prompts": RUN["prompts"][4::4], "score": True}


def _mean_difference(one: list[list[float]], two: list[list[float]]) -> float:
    pairs = [p for both in zip(one, two, strict=True) for p in zip(*both, strict=True)]
    return sum(abs(a - b) for a, b in pairs) / len(pairs)


@pytest.mark.parametrize("write", [write_bloom, _write_gpt_oss], ids=["ALiBi", "sinks"])
def test_alibi_and_sinks(
    plugin: EngineProcess, stock: EngineProcess, tmp_path: Path, write: Any
) -> None:
    engine = settings(write(tmp_path / "model"), max_model_len=2048)
    answer = plugin.run(engine | {"block_size": 32}, RUN, SCORE)
    assert answer.made_of["backends"] == ["AscendCPUAttentionBackend"]
    assert_same(stock.run(engine, RUN).outputs(), answer.outputs())
    int8 = {"block_size": 32, "kv_cache_dtype": "int8_per_token_head"}
    scores = plugin.run(engine | int8, SCORE).runs[0]["scores"]
    assert 0 < _mean_difference(answer.runs[1]["scores"], scores) < 0.2


def test_float16_is_as_accurate_as_stock(
    plugin: EngineProcess, stock: EngineProcess, tiny: TinyModels
) -> None:
    model = tiny("llama")
    exact = stock.run(settings(model), SCORE).runs[0]["scores"]
    theirs = stock.run(settings(model) | {"dtype": "float16"}, SCORE).runs[0]["scores"]
    answer = plugin.run(settings(model) | {"dtype": "float16"}, SCORE)
    assert answer.made_of["dtypes"] == ["torch.float16"]
    ours = _mean_difference(exact, answer.runs[0]["scores"])
    assert 0 < ours < 1.2 * _mean_difference(exact, theirs)
