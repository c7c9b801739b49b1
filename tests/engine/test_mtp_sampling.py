"""Drafts do not change what is drawn: the distribution of tokens is the model's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from drawing import LEVEL, PROMPT, VOCABULARY, chance, pairs
from engines import EngineProcess
from offline_mtp import OfflineMTP
from tiny_engines import TinyModels, settings

from ascend_plugin.spec_decode.token_order import TokenOrder, save_order

pytestmark = pytest.mark.engine

DRAWS = 3000


@pytest.fixture(scope="module")
def model(tiny: TinyModels) -> str:
    shape = {"architecture": "mimo", "hidden": 256, "heads": 4, "kv_heads": 2}
    return tiny("mimo of few tokens", vocab=VOCABULARY, **shape)


@pytest.fixture(scope="module")
def offline(model: str) -> OfflineMTP:
    return OfflineMTP(model)


def engine(model: str, head: str | None = None, **speculation: Any) -> dict[str, Any]:
    more = {"speculative_config": {"method": "mtp", **speculation}} if speculation else {}
    if head:
        more["additional_config"] = {"speculation": {"draft_head": {"file": head}}}
    return settings(model, max_num_seqs=64, max_num_batched_tokens=512, block_size=16, **more)


def drawn(
    plugin: EngineProcess, engine: dict[str, Any], temperature: float, frequency: float
) -> list[list[int]]:
    sampling = {"temperature": temperature, "frequency_penalty": frequency}
    run = {"prompts": [PROMPT] * DRAWS, "max_tokens": 4, "sampling": sampling}
    answer = plugin.run(engine, run)
    if "speculative_config" in engine:
        accepted = answer.metrics["vllm:spec_decode_num_accepted_tokens"]
        assert 0 < accepted < answer.metrics["vllm:spec_decode_num_draft_tokens"]
    return [output.tokens for output in answer.outputs()]


@pytest.mark.parametrize("frequency", [0.0, 0.8], ids=["plain", "penalty"])
@pytest.mark.parametrize("draft_sample_method", ["greedy", "probabilistic"])
def test_the_distribution_is_the_models(
    plugin: EngineProcess,
    model: str,
    offline: OfflineMTP,
    draft_sample_method: str,
    frequency: float,
) -> None:
    speculation = {"num_speculative_tokens": 2, "draft_sample_method": draft_sample_method}
    found = drawn(plugin, engine(model, **speculation), 0.9, frequency)
    assert chance(found, pairs(offline, 0.9, frequency)) > LEVEL


@pytest.mark.parametrize("draft_sample_method", ["greedy", "probabilistic"])
def test_a_draft_head_leaves_it_alone(
    plugin: EngineProcess,
    model: str,
    offline: OfflineMTP,
    tmp_path: Path,
    draft_sample_method: str,
) -> None:
    """Drafts are among half of the tokens; the other half is drawn as often as ever."""
    head = tmp_path / "head.safetensors"
    save_order(head, TokenOrder(torch.arange(0, VOCABULARY, 2).int(), VOCABULARY), {})
    speculation = {"num_speculative_tokens": 2, "draft_sample_method": draft_sample_method}
    found = drawn(plugin, engine(model, str(head), **speculation), 0.9, 0.0)
    assert chance(found, pairs(offline, 0.9, 0.0)) > LEVEL


def test_the_test_would_notice(plugin: EngineProcess, model: str, offline: OfflineMTP) -> None:
    """Guards the one above: slightly other distributions are told apart with as many draws."""
    found = drawn(plugin, engine(model), 0.9, 0.0)
    assert chance(found, pairs(offline, 0.9, 0.0)) > LEVEL
    assert chance(found, pairs(offline, 1.1, 0.0)) < LEVEL / 10
    assert chance(found, pairs(offline, 0.9, 0.6)) < LEVEL / 10
