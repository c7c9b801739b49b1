"""Two NPUs over hccl, each in a process of its own."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
from deepseek_mtp import write_deepseek_mtp
from engines import EngineProcess
from mtp_cases import accepted_share, mtp
from npu_engines import NPUModels, assert_near, settings
from offline_llama import FakeCache, worst_difference
from prompts import tokens
from quant_checkpoints import QuantisedModels
from tiny_deepseek import NPU_LATENTS

from ascend_plugin.ops.sim.options import OPTIONS_VARIABLE, SimulatorOptions

pytestmark = [pytest.mark.engine, pytest.mark.slow]

RUN = {"prompts": [tokens(count, seed=count) for count in (7, 150)], "max_tokens": 6}


@pytest.fixture(scope="module")
def pair() -> Iterator[EngineProcess]:
    """An engine process that sees two devices and starts workers."""
    import torch

    variables = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_WORKER_MULTIPROC_METHOD": "spawn"}
    simulated = SimulatorOptions.from_environment()
    if simulated is not None:
        variables[OPTIONS_VARIABLE] = replace(simulated, devices=2).to_json()
    elif torch.accelerator.device_count() < 2:
        pytest.skip("this machine has one NPU")
    process = EngineProcess(dict(os.environ) | variables)
    yield process
    process.stop()


def test_tokens_are_those_of_one_device(
    npu: EngineProcess, pair: EngineProcess, models: NPUModels
) -> None:
    """Prefill runs eagerly, decode from graphs that contain the collectives."""
    model = models("qwen3", layers=2)
    one = npu.run(settings(model, "full"), RUN)
    # Asynchronous scheduling, the default: the second worker never waits for its device itself.
    two = pair.run(settings(model, "full", tensor_parallel_size=2), RUN)
    assert_near(one.outputs(), two.outputs())
    assert "MultiprocExecutor" in two.made_of["executor"]


def test_experts_are_spread(npu: EngineProcess, pair: EngineProcess, models: NPUModels) -> None:
    """Each device has half of the experts, and adds nothing for the others'."""
    model = models("qwen3_moe", architecture="qwen3_moe", intermediate=64, layers=2)
    one = npu.run(settings(model, "full"), RUN)
    spread = {"tensor_parallel_size": 2, "enable_expert_parallel": True}
    two = pair.run(settings(model, "full", **spread), RUN)
    assert_near(one.outputs(), two.outputs())
    assert "MultiprocExecutor" in two.made_of["executor"]
    assert "[EP Rank 0/2] Expert parallelism is enabled" in two.log


#: The largest difference of logprobs from the float64 model that a checkpoint means: inputs of
#: rows that are split are quantised per process.
OFF = 0.5


@pytest.mark.parametrize(
    ("name", "architecture"),
    [("modelslim-mixed", "llama"), ("compressed-w4a16-group", "qwen3_moe")],
)
def test_quantised_weights(
    pair: EngineProcess, quantised: QuantisedModels, name: str, architecture: str
) -> None:
    """Rows and columns of integers, and of experts, on two devices make the model."""
    written = quantised(name, architecture)
    two = pair.run(settings(written.path, "full", tensor_parallel_size=2), RUN)
    caches = [FakeCache()] * written.offline.layers
    for prompt, output in zip(RUN["prompts"], two.outputs(), strict=True):
        assert worst_difference(written.offline, caches, prompt, output) < OFF


@pytest.fixture(scope="module")
def deepseek(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A model with latent attention, experts in groups and a draft layer."""
    return write_deepseek_mtp(tmp_path_factory.mktemp("deepseek") / "mtp", **NPU_LATENTS)


SPREAD = {"enable_expert_parallel": True}
#: A verification or a plain step of one sequence or two.
STEPS = {
    "compilation_config": {
        "mode": 0,
        "cudagraph_mode": "FULL_DECODE_ONLY",
        "cudagraph_capture_sizes": [4, 8],
    }
}
LONGER = RUN | {"max_tokens": 24}


@pytest.mark.parametrize("options", [{}, SPREAD, SPREAD | mtp(3)], ids=["tp", "ep", "ep, mtp"])
def test_latents_and_their_experts(
    npu: EngineProcess, pair: EngineProcess, deepseek: str, options: dict[str, Any]
) -> None:
    """Each device has half of the heads, all latents, and a part of every expert or whole ones."""
    engine = settings(deepseek, "full", dtype="float16") | STEPS
    one = npu.run(engine, LONGER)
    two = pair.run(engine | {"tensor_parallel_size": 2} | options, LONGER)
    assert_near(one.outputs(), two.outputs())
    assert "MultiprocExecutor" in two.made_of["executor"]
    spread = "[EP Rank 0/2] Expert parallelism is enabled" in two.log
    assert spread == ("enable_expert_parallel" in options)
    if "speculative_config" in options:
        alone = npu.run(engine | mtp(3), LONGER)
        assert accepted_share(two) == pytest.approx(accepted_share(alone), rel=0.1)
