"""Two NPUs over hccl, each in a process of its own."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import replace

import pytest
from engines import EngineProcess
from npu_engines import NPUModels, assert_near, settings
from prompts import tokens

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
