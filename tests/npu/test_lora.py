"""LoRA on an NPU: the tokens of the CPU platform, in every graph mode."""

from __future__ import annotations

from typing import Any

import pytest
from adapters import write_adapter
from engines import Answer, EngineProcess, first_differences
from npu_engines import CAPTURED, NPUModels, assert_identical, assert_near, on_the_cpu, settings
from prompts import tokens

pytestmark = pytest.mark.engine

LAYERS = 2
STEPS = 8
PROMPTS = [tokens(length, seed=length) for length in (7, 130)]

#: Beside two adapters in one batch, requests without any.
USED = 3


@pytest.fixture(scope="module")
def engine(models: NPUModels) -> dict[str, Any]:
    slots = {"enable_lora": True, "max_lora_rank": 8, "max_loras": USED - 1}
    return settings(models("qwen3", layers=LAYERS), **slots)


@pytest.fixture(scope="module")
def run(engine: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("adapters")
    adapters = [write_adapter(engine["model"], folder / str(seed), seed) for seed in (1, 2)]
    prompts = [prompt for prompt in PROMPTS for _ in range(USED)]
    return {"prompts": prompts, "max_tokens": STEPS, "adapters": [*adapters, None] * len(PROMPTS)}


@pytest.fixture(scope="module")
def eager(npu: EngineProcess, engine: dict[str, Any], run: dict[str, Any]) -> Answer:
    return npu.run(engine, run)


def test_tokens_are_those_of_the_cpu(
    cpu: EngineProcess, engine: dict[str, Any], run: dict[str, Any], eager: Answer
) -> None:
    assert eager.made_of["platform"] == "AscendNPUPlatform"
    wanted = cpu.run(on_the_cpu(engine), run).outputs()
    assert_near(wanted, eager.outputs())
    by_adapter = [eager.outputs()[i::USED] for i in range(USED)]
    for i in range(USED):  # each adapter, and none, gives answers of its own
        assert first_differences(by_adapter[i], by_adapter[i - 1])


@pytest.mark.parametrize("graphs", ["full", "piecewise"])
def test_graphs_give_the_tokens_of_the_eager_engine(
    npu: EngineProcess, engine: dict[str, Any], run: dict[str, Any], eager: Answer, graphs: str
) -> None:
    """Graphs hold for any mix of adapters, with rows that only fill up their batch."""
    slots = {name: engine[name] for name in ("enable_lora", "max_lora_rank", "max_loras")}
    answer = npu.run(settings(engine["model"], graphs, **slots), run)
    assert_identical(eager.outputs(), answer.outputs())
    assert answer.made_of["graphs"]["replays"] > 0
    if graphs == "full":
        # Of batches with adapters, and of those without any.
        assert answer.made_of["graphs"]["task_groups"] == 2 * len(CAPTURED) * LAYERS
