"""Models with other attention than Llama's: equal to stock vLLM in float32."""

from __future__ import annotations

import pytest
from engines import EngineProcess, assert_same, first_differences
from prompts import mixed_prompts
from tiny_engines import TinyModels, assert_is_plugin, settings

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
