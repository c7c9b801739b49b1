"""Caches that are too small: requests lose their pages, and get others when they come back."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from engines import Answer, EngineProcess
from int8_engines import Int8Model, Int8Models
from npu_engines import NEAR_TIE, NPUModels, assert_near, settings
from prompts import tokens

pytestmark = pytest.mark.engine

BLOCK = 16
STEPS = 40

#: Together they need 15 blocks at their beginning and 30 at their end.
LENGTHS = (20, 25, 30, 35, 40, 45)
SMALL = 17

PROMPTS = [tokens(count, seed=count) for count in LENGTHS]
FORWARD = {"prompts": PROMPTS, "max_tokens": STEPS}
BACKWARD = {"prompts": PROMPTS[::-1], "max_tokens": STEPS}


@pytest.fixture(scope="module")
def model(models: NPUModels) -> str:
    return models("qwen3", layers=2)


@pytest.fixture(scope="module")
def int8(models: NPUModels, tmp_path_factory: pytest.TempPathFactory) -> Int8Model:
    folder: Path = tmp_path_factory.mktemp("preempted scales")
    named = Int8Models(models, folder)
    return named("preempted", architecture="llama", heads=4, kv_heads=2, layers=2)


def _engine(model: str, graphs: str = "eager", **more: Any) -> dict[str, Any]:
    """Without a prefix cache, and with short contexts: one request always fits."""
    short = {"block_size": BLOCK, "max_model_len": 192, "enable_prefix_caching": False}
    return settings(model, graphs, **{**short, **more})


def _check(npu: EngineProcess, wide: dict[str, Any], small: dict[str, Any], tie: float) -> Answer:
    """The small cache preempts, the wide one does not, and their tokens are the same."""
    wanted = npu.run(wide, FORWARD)
    assert wanted.metrics["vllm:num_preemptions"] == 0
    answer = npu.run(small | {"num_gpu_blocks_override": SMALL}, FORWARD, BACKWARD)
    assert answer.metrics["vllm:num_preemptions"] > 3
    assert_near(wanted.outputs(), answer.outputs(0), tie)
    assert_near(wanted.outputs()[::-1], answer.outputs(1), tie)
    return answer


@pytest.mark.parametrize("graphs", ["eager", "full"])
def test_preempted_requests_find_their_prefix(npu: EngineProcess, model: str, graphs: str) -> None:
    """What is left of their pages is used again, beside blocks that others have written since."""
    small = _engine(model, graphs, enable_prefix_caching=True)
    answer = _check(npu, _engine(model), small, NEAR_TIE)
    # Nobody shares a prefix with another, so each hit is a request's own, or of the run before.
    assert answer.metrics["vllm:prefix_cache_hits"] > 0


def test_without_a_prefix_cache_they_start_anew(npu: EngineProcess, model: str) -> None:
    _check(npu, _engine(model), _engine(model), NEAR_TIE)


def test_scales_follow_their_pages(npu: EngineProcess, int8: Int8Model) -> None:
    """Of blocks that change hands: a scale of their last owner would change the tokens."""
    engine = _engine(
        int8.path,
        kv_cache_dtype="int8_per_token_head",
        additional_config=int8.config("c8d"),
    )
    answer = _check(npu, engine, engine | {"enable_prefix_caching": True}, 0.2)
    assert answer.metrics["vllm:prefix_cache_hits"] > 0
