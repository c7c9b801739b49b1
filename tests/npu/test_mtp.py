"""Multi-token prediction on the NPU: drafts from pages, verified by captured graphs."""

from __future__ import annotations

from typing import Any

import pytest
from engines import Answer, EngineProcess
from npu_engines import NPUModels, assert_identical, assert_near, on_the_cpu, settings
from prompts import tokens

pytestmark = pytest.mark.engine

DRAFTS = 3
MTP = {"speculative_config": {"method": "mtp", "num_speculative_tokens": DRAFTS}}
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


def test_int8_pages(npu: EngineProcess, model: str) -> None:
    int8 = {"kv_cache_dtype": "int8_per_token_head"}
    plain = npu.run(settings(model, **int8), RUN)
    answer = npu.run(full(model, **int8), RUN)
    assert_near(plain.outputs(), answer.outputs(), tie=0.2)
    assert accepted(answer) > 1
    assert answer.made_of["graphs"]["replays"] > 0


def test_too_many_drafts_are_refused(npu: EngineProcess, model: str) -> None:
    many = {"speculative_config": {"method": "mtp", "num_speculative_tokens": 16}}
    with pytest.raises(RuntimeError, match=r"num_speculative_tokens=16 .* Allowed are 1 to 15"):
        npu.run(settings(model, **many), RUN)
