"""Engines on the NPU whose int8 caches are written and read by AscendC kernels."""

from __future__ import annotations

from typing import Any

import pytest
from engines import EngineProcess
from int8_engines import Int8Model, Int8Models
from npu_engines import CAPTURED, NPUModels, assert_identical, assert_near, on_the_cpu, settings
from prompts import tokens

from ascend_plugin.ops.ascendc import library

pytestmark = [
    pytest.mark.engine,
    pytest.mark.skipif(bool(library.why_missing()), reason=library.why_missing() or "there"),
]

LAYERS = 2

#: Attention rounds its 16-bit halves otherwise than the CPU's operators: choices of tokens that are
#: as close as this are no mistakes.
NEAR_TIE = 0.2

RUN = {"prompts": [tokens(count, seed=count) for count in (7, 39, 150, 300)], "max_tokens": 10}

#: A text that repeats itself: drafts are found, and some are wrong.
DRAFTED = {"prompts": [tokens(6, seed=3) * 8, tokens(40, seed=5)], "max_tokens": 16}

NGRAM = {
    "method": "ngram",
    "num_speculative_tokens": 3,
    "prompt_lookup_max": 3,
    "prompt_lookup_min": 1,
}


@pytest.fixture(scope="module")
def model(models: NPUModels, tmp_path_factory: pytest.TempPathFactory) -> Int8Model:
    """Heads that torch_npu's fused operator does not list for int8 pages."""
    int8 = Int8Models(models, tmp_path_factory.mktemp("scales"))
    return int8("kernels", architecture="llama", heads=4, kv_heads=2, layers=LAYERS)


def _engine(model: Int8Model, variant: str, graphs: str, **more: Any) -> dict[str, Any]:
    return settings(
        model.path,
        graphs,
        kv_cache_dtype="int8_per_token_head",
        additional_config=model.config(variant),
        **more,
    )


@pytest.mark.parametrize("variant", ["c8d", "c8s", "c8p"])
def test_tokens_are_those_of_the_cpu_and_steps_are_captured_whole(
    npu: EngineProcess, cpu: EngineProcess, model: Int8Model, variant: str
) -> None:
    wanted = cpu.run(on_the_cpu(_engine(model, variant, "eager")), RUN)
    answer = npu.run(_engine(model, variant, "full"), RUN)
    told = answer.made_of["implementations"]
    assert told["kv_cache_write (npu)"] == ["ascendc"]
    assert told["paged_attention (npu)"] == ["ascendc", "ascendc-gather"]
    assert_near(wanted.outputs(), answer.outputs(), NEAR_TIE)
    graphs = answer.made_of["graphs"]
    assert graphs["captures"] == len(CAPTURED)
    assert graphs["replays"] > 0
    assert (graphs["task_groups"], graphs["updates"]) == (0, 0)
    rows, _, patched, _ = answer.counters[variant]
    assert rows > 0
    assert (patched > 0) == (variant == "c8p")


def test_graphs_change_nothing(npu: EngineProcess, model: Int8Model) -> None:
    eager = npu.run(_engine(model, "c8p", "eager"), RUN)
    full = npu.run(_engine(model, "c8p", "full"), RUN)
    assert_identical(eager.outputs(), full.outputs())


@pytest.mark.parametrize("variant", ["c8d", "c8s", "c8p"])
def test_verifying_drafts_gives_the_tokens_of_the_cpu(
    npu: EngineProcess, cpu: EngineProcess, model: Int8Model, variant: str
) -> None:
    wanted = cpu.run(on_the_cpu(_engine(model, variant, "eager")), DRAFTED)
    answer = npu.run(_engine(model, variant, "full", speculative_config=NGRAM), DRAFTED)
    assert answer.metrics["vllm:spec_decode_num_accepted_tokens"] > 0
    assert "ascendc" in answer.made_of["implementations"]["paged_attention (npu)"]
    assert answer.made_of["graphs"]["replays"] > 0
    assert_near(wanted.outputs(), answer.outputs(), NEAR_TIE)
