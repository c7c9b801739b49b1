"""Whole engines on the NPU: the CPU platform's tokens, in every graph mode."""

from __future__ import annotations

import pytest
from engines import Answer, EngineProcess
from npu_engines import (
    CAPTURED,
    GRAPHS,
    NPUModels,
    assert_identical,
    assert_near,
    on_the_cpu,
    settings,
)
from prompts import tokens

pytestmark = pytest.mark.engine

LAYERS = 2
STEPS = 10

#: Some are prefilled in several chunks; the last one continues the one before it.
LENGTHS = (7, 39, 150, 300)


def prompts() -> list[list[int]]:
    return [tokens(count, seed=count) for count in LENGTHS]


def runs() -> list[dict]:
    more = [*prompts()[-1], 11, 12]
    return [
        {"prompts": prompts(), "max_tokens": STEPS},
        {"prompts": [more], "max_tokens": STEPS},
    ]


@pytest.fixture(scope="module")
def model(models: NPUModels) -> str:
    return models("qwen3", layers=LAYERS)


@pytest.fixture(scope="module")
def wanted(cpu: EngineProcess, model: str) -> Answer:
    return cpu.run(on_the_cpu(settings(model)), *runs())


@pytest.fixture(scope="module")
def eager(npu: EngineProcess, model: str) -> Answer:
    return npu.run(settings(model), *runs())


def test_eager_tokens_are_those_of_the_cpu(wanted: Answer, eager: Answer) -> None:
    assert eager.made_of["platform"] == "AscendNPUPlatform"
    assert eager.made_of["worker"] == "AscendNPUWorker"
    assert eager.made_of["backends"] == ["AscendNPUAttentionBackend"]
    assert eager.made_of["block_sizes"] == [128]
    assert wanted.made_of["platform"] == "AscendCPUPlatform"
    for run in range(2):
        assert_near(wanted.outputs(run), eager.outputs(run))


def test_a_prefix_is_found_in_the_cache(eager: Answer) -> None:
    assert [output.cached for output in eager.outputs(1)] == [256]


@pytest.mark.parametrize("graphs", [name for name in GRAPHS if name != "eager"])
def test_graphs_give_the_tokens_of_the_eager_engine(
    npu: EngineProcess, model: str, eager: Answer, graphs: str
) -> None:
    answer = npu.run(settings(model, graphs), *runs())
    for run in range(2):
        assert_identical(eager.outputs(run), answer.outputs(run))
    counts = answer.made_of["graphs"]
    full, pieces = "full" in graphs, "piecewise" in graphs
    sizes = len(CAPTURED)
    # A model of n layers is cut into n + 1 pieces by its attention.
    assert counts["captures"] == sizes * (full + pieces * (LAYERS + 1))
    # One task group for each layer of each whole graph: with none, lengths would freeze.
    assert counts["task_groups"] == full * sizes * LAYERS
    if graphs == "full":
        assert counts["updates"] == counts["replays"] * LAYERS
    assert counts["replays"] > 0
    assert full == (counts["updates"] > 0)


@pytest.mark.parametrize("graphs", ["eager", "full", "full and piecewise"])
def test_drafts_do_not_change_answers(npu: EngineProcess, model: str, graphs: str) -> None:
    # Alone, so that its verification is a uniform batch whenever there are drafts.
    run = {"prompts": [tokens(6, seed=3) * 8], "max_tokens": 24}
    plain = npu.run(settings(model), run)
    drafting = {
        "method": "ngram",
        "num_speculative_tokens": 3,
        "prompt_lookup_max": 3,
        "prompt_lookup_min": 1,
    }
    answer = npu.run(settings(model, graphs, speculative_config=drafting), run)
    assert_near(plain.outputs(), answer.outputs())
    assert answer.metrics["vllm:spec_decode_num_draft_tokens"] > 0
    if graphs != "eager":
        assert answer.made_of["graphs"]["updates"] > 0


SAMPLING = {
    "logprobs": {"logprobs": 3, "prompt_logprobs": 2},
    "temperature": {"temperature": 0.8, "seed": 7},
    "top k": {"temperature": 0.8, "top_k": 20, "seed": 7},
    "top p": {"temperature": 0.8, "top_p": 0.9, "seed": 7},
    "min p": {"temperature": 0.8, "min_p": 0.05, "seed": 7},
    "penalties": {
        "repetition_penalty": 1.2,
        "presence_penalty": 0.3,
        "frequency_penalty": 0.2,
    },
    "bias": {"logit_bias": {5: 9.0}},
    "allowed": {"allowed_token_ids": [5, 6, 7]},
    "least tokens": {"min_tokens": 3, "stop_token_ids": [9]},
}


def test_every_way_to_sample(npu: EngineProcess, model: str) -> None:
    asked = [
        {"prompts": prompts()[:2], "max_tokens": 6, "sampling": {"logprobs": 2, **options}}
        for options in SAMPLING.values()
    ]
    answer = npu.run(settings(model), *asked, *asked)
    for i, name in enumerate(SAMPLING):
        first, again = answer.outputs(i), answer.outputs(i + len(SAMPLING))
        assert [o.tokens for o in first] == [o.tokens for o in again], name
    allowed = list(SAMPLING).index("allowed")
    assert {t for o in answer.outputs(allowed) for t in o.tokens} <= {5, 6, 7}


def test_memory_of_graphs_is_taken_from_the_cache(npu: EngineProcess, model: str) -> None:
    """Without a given size the cache gets what model, activations and graphs leave."""
    engine = settings(model, "full", gpu_memory_utilization=0.5)
    del engine["kv_cache_memory_bytes"]
    answer = npu.run(engine, *runs()[:1])
    assert "Captured graphs will take about" in answer.log
    # Twice: profiled with two sizes and thrown away, then captured.
    assert answer.made_of["graphs"]["captures"] == 2 + len(CAPTURED)
    assert answer.made_of["num_blocks"] > 100


@pytest.mark.model
@pytest.mark.parametrize("graphs", ["eager", "full"])
def test_smollm2(npu: EngineProcess, cpu: EngineProcess, smollm2: str, graphs: str) -> None:
    """A real model with head dimension 64; in bfloat16, close choices may turn out otherwise."""
    run = {"prompts": [tokens(12, seed=1), tokens(130, seed=2)], "max_tokens": 6}
    wanted = cpu.run(on_the_cpu(settings(smollm2)), run)
    engine = settings(smollm2, graphs)
    if graphs == "full":
        engine["compilation_config"] = engine["compilation_config"] | {
            "cudagraph_capture_sizes": [2]
        }
    answer = npu.run(engine, run)
    assert_near(wanted.outputs(), answer.outputs(), tie=0.15)
    assert answer.made_of["graphs"]["task_groups"] == (graphs == "full") * 30
