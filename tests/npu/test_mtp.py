"""Multi-token prediction on the NPU: drafts from pages, verified by captured graphs."""

from __future__ import annotations

from typing import Any

import pytest
from drawing import LEVEL, PROMPT, VOCABULARY, chance, pairs
from engines import Answer, EngineProcess
from int8_engines import Int8Model, Int8Models
from npu_engines import NPUModels, assert_identical, assert_near, on_the_cpu, settings
from offline_mtp import OfflineMTP
from prompts import tokens

from ascend_plugin.ops.ascendc import library

pytestmark = pytest.mark.engine

DRAFTS = 3
MTP = {"speculative_config": {"method": "mtp", "num_speculative_tokens": DRAFTS}}
#: Codes of keys may differ by one, because they are turned in bfloat16.
INT8_TIE = 0.2
#: Every size is a whole number of verifications.
SIZES = [4, 8, 16]
FULL = {
    "compilation_config": {
        "mode": 0,
        "cudagraph_mode": "FULL_DECODE_ONLY",
        "cudagraph_capture_sizes": SIZES,
    }
}
#: One prompt is prefilled in two chunks.
RUN = {"prompts": [tokens(count, seed=count) for count in (7, 30, 61, 150)], "max_tokens": 30}


@pytest.fixture(scope="module")
def model(models: NPUModels) -> str:
    return models("mimo", architecture="mimo", hidden=512, heads=4)


def engine(model: str, **more: Any) -> dict[str, Any]:
    """An engine that drafts."""
    return settings(model, **MTP, **more)


def full(model: str, **more: Any) -> dict[str, Any]:
    """The same with captured decode steps."""
    plain = {name: value for name, value in engine(model).items() if name != "enforce_eager"}
    return {**plain, **FULL, **more}


def accepted(answer: Answer) -> float:
    """Return how many drafts a proposal got accepted on average."""
    return (
        answer.metrics["vllm:spec_decode_num_accepted_tokens"]
        / answer.metrics["vllm:spec_decode_num_drafts"]
    )


def test_tokens_and_drafts_are_those_of_the_cpu(
    npu: EngineProcess, cpu: EngineProcess, model: str
) -> None:
    """Drafts too: a key at a wrong place or of a rejected token would be refused more often."""
    plain = npu.run(settings(model), RUN)
    answer = npu.run(engine(model), RUN)
    assert_near(plain.outputs(), answer.outputs())
    wanted = cpu.run(on_the_cpu(engine(model)), RUN)
    # Of some fifty proposals; bfloat16 decides otherwise in some.
    assert accepted(answer) == pytest.approx(accepted(wanted), rel=0.2)
    assert accepted(answer) > 1


def test_verification_is_captured_once(npu: EngineProcess, model: str) -> None:
    eager = npu.run(engine(model), RUN)
    first = npu.run(full(model), RUN)
    assert_identical(eager.outputs(), first.outputs())
    assert accepted(first) == accepted(eager)
    graphs = dict(first.made_of["graphs"])
    assert graphs["captures"] == len(SIZES)
    assert graphs["replays"] > 0
    other = {"prompts": [tokens(count, seed=count + 1) for count in (20, 61)], "max_tokens": 12}
    again = npu.run(full(model), other).made_of["graphs"]
    assert again["captures"] == graphs["captures"]
    assert again["replays"] > graphs["replays"]


@pytest.fixture(scope="module")
def int8(models: NPUModels, tmp_path_factory: pytest.TempPathFactory) -> Int8Model:
    """A model with static scales; one token in seven is an outlier in every layer."""
    make = Int8Models(models, tmp_path_factory.mktemp("scales"))
    return make("mimo", architecture="mimo", hidden=512, heads=4)


@pytest.mark.parametrize("variant", ["c8d", "c8s", "c8p"])
def test_int8_pages(npu: EngineProcess, cpu: EngineProcess, int8: Int8Model, variant: str) -> None:
    """Verified from whole captured steps; the draft layer's pages are c8d beside all of them."""
    if variant != "c8d" and library.why_missing():
        pytest.skip(library.why_missing())
    quantised = {
        "kv_cache_dtype": "int8_per_token_head",
        "additional_config": int8.config(variant),
    }
    plain = npu.run(settings(int8.path, **quantised), RUN)
    answer = npu.run(full(int8.path, **quantised), RUN)
    assert answer.made_of["block_sizes"] == [128]
    assert_near(plain.outputs(), answer.outputs(), tie=INT8_TIE)
    wanted = cpu.run(on_the_cpu(engine(int8.path, **quantised)), RUN)
    # Static scales cut off what is loud in the model and not in its drafts: most are refused.
    assert accepted(answer) == pytest.approx(accepted(wanted), rel=0.2, abs=0.1)
    assert accepted(answer) > (0.08 if variant == "c8s" else 0.5)
    assert set(answer.counters) == {"c8d", variant}
    assert answer.made_of["graphs"]["captures"] == len(SIZES)
    assert answer.made_of["graphs"]["replays"] > 0


DRAWS = 1500


@pytest.mark.parametrize("draft_sample_method", ["greedy", "probabilistic"])
def test_the_distribution_is_the_models(
    npu: EngineProcess, models: NPUModels, draft_sample_method: str
) -> None:
    """Drafts are accepted and replaced on the device so that draws are the model's own."""
    shape = {"architecture": "mimo", "hidden": 512, "heads": 4, "vocab": VOCABULARY}
    path = models("mimo of few tokens", **shape)
    sampling = {"temperature": 0.9, "frequency_penalty": 0.8}
    run = {"prompts": [PROMPT] * DRAWS, "max_tokens": 4, "sampling": sampling}
    many = settings(path, max_num_seqs=64, max_num_batched_tokens=1024)
    many["speculative_config"] = {
        "method": "mtp",
        "num_speculative_tokens": 2,
        "draft_sample_method": draft_sample_method,
    }
    answer = npu.run(many, run)
    drafts = answer.runs[0]["drafts"]
    assert 0 < drafts["accepted_tokens"] < drafts["draft_tokens"]
    drawn = [output.tokens for output in answer.outputs()]
    offline = OfflineMTP(path)
    assert chance(drawn, pairs(offline, 0.9, 0.8)) > LEVEL
    # As many draws tell another distribution apart.
    assert chance(drawn, pairs(offline, 1.6, 0.8)) < LEVEL / 10


def test_too_many_drafts_are_refused(npu: EngineProcess, model: str) -> None:
    many = {"speculative_config": {"method": "mtp", "num_speculative_tokens": 16}}
    with pytest.raises(RuntimeError, match=r"num_speculative_tokens=16 .* Allowed are 1 to 15"):
        npu.run(settings(model, **many), RUN)
