"""Decode steps that are recorded and repeated say what steps operator by operator say."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from engines import Answer, EngineProcess, assert_same
from prompts import mixed_prompts, tokens
from tiny_engines import TinyModels, settings, write_bloom

pytestmark = pytest.mark.engine

RUN = {"prompts": mixed_prompts(longest=600)[::3], "max_tokens": 16}

#: Models, and settings of their engines.
RECORDED: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "llama": ({}, {}),
    "biases": ({"architecture": "qwen2", "head_dim": 32}, {}),
    "norms of heads": ({"architecture": "qwen3", "head_dim": 128}, {}),
    "sliding window": ({"architecture": "mistral", "sliding_window": 50}, {}),
    "int8 pages": ({}, {"kv_cache_dtype": "int8_per_token_head"}),
    "scaled embeddings, norms in float32": (
        {"architecture": "gemma2", "sliding_window": 40, "attn_softcap": 3.0},
        {"dtype": "bfloat16"},
    ),
}


def _eagerly(engine: dict[str, Any]) -> dict[str, Any]:
    return {**engine, "enforce_eager": True}


def _check_recorded(answer: Answer, repeated: int = 8) -> None:
    recorded, again, given_up = answer.steps["Decode"]
    assert given_up is None
    assert 0 < recorded < 60, "one for each number of tokens and requests"
    assert again > repeated


@pytest.mark.parametrize("name", RECORDED)
def test_as_operator_by_operator(plugin: EngineProcess, tiny: TinyModels, name: str) -> None:
    model, more = RECORDED[name]
    engine = settings(tiny(f"recorded {name}", **model), **more)
    eager = plugin.run(_eagerly(engine), RUN)
    assert eager.steps == {}
    assert "run operator by operator: --enforce-eager" in eager.log
    answer = plugin.run(engine, RUN)
    assert "recorded and repeated as native calls" in answer.log
    _check_recorded(answer)
    assert_same(eager.outputs(), answer.outputs())


def test_drafts_verified_in_recorded_steps(plugin: EngineProcess, tiny: TinyModels) -> None:
    run = {"prompts": [tokens(20, seed=i) * 6 for i in range(6)], "max_tokens": 24}
    ngram = {"method": "ngram", "num_speculative_tokens": 4, "prompt_lookup_max": 3}
    ngram["prompt_lookup_min"] = 1
    engine = settings(tiny("llama"), speculative_config=ngram)
    eager = plugin.run(_eagerly(engine), run)
    answer = plugin.run(engine, run)
    assert answer.metrics["vllm:spec_decode_num_draft_tokens"] > 50
    _check_recorded(answer)
    assert_same(eager.outputs(), answer.outputs())


def test_a_model_that_cannot_be_recorded_is_served(plugin: EngineProcess, tmp_path: Path) -> None:
    engine = settings(write_bloom(tmp_path / "bloom"))
    eager, answer = plugin.run(_eagerly(engine), RUN), plugin.run(engine, RUN)
    recorded, repeated, given_up = answer.steps["Decode"]
    assert (recorded, repeated) == (0, 0)
    assert "layer_norm.default has no native kernel" in given_up
    assert answer.log.count("Decode steps run operator by operator") == 1
    assert_same(eager.outputs(), answer.outputs())
