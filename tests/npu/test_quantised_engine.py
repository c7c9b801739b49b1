"""Quantised weights on the NPU: the CPU platform's tokens, and what the checkpoint means."""

from __future__ import annotations

from typing import Any

import pytest
from engines import Answer, EngineProcess
from npu_engines import CAPTURED, assert_identical, assert_near, on_the_cpu, settings
from offline_llama import FakeCache, worst_difference
from prompts import tokens
from quant_checkpoints import QuantisedModels

pytestmark = pytest.mark.engine

PROMPTS = [tokens(length, seed=i) for i, length in enumerate((5, 129))]
RUN: dict[str, Any] = {"prompts": PROMPTS, "max_tokens": 6}

#: Checkpoints by name, and what they run as on an NPU.
SERVED = {
    "modelslim-w8a8": ("W8A8",),
    "modelslim-mixed": ("W8A8", "FLOAT", "W8A16", "W8A8_DYNAMIC", "W4A16"),
    "modelslim-w4a16-group-asymmetric": ("W4A16",),
    "modelslim-quarot": ("W8A8_DYNAMIC",),
    "compressed-w8a8-static-asymmetric": ("W8A8",),
    "compressed-w8a8-dynamic-asymmetric": ("W8A16",),
    "compressed-w4a16-channel-asymmetric": ("W4A16",),
    "compressed-w8a16": ("W8A16",),
    "compressed-transforms": ("W4A16",),
    "compressed-lm-head": ("W4A16",),
    "gptq-desc-act": ("W4A16",),
    "awq": ("W4A16",),
}

#: Logprobs in bfloat16 of a model whose inputs stay 16-bit, and of one whose are quantised.
TOLERANCE, QUANTISED_INPUTS = 0.15, 0.4

#: Quantised inputs differ by whole codes between platforms, so ties are wider.
WIDE_TIE = 0.15


def _near(cpu: EngineProcess, engine: dict[str, Any], answer: Answer) -> None:
    wanted = cpu.run(on_the_cpu(engine), RUN)
    assert_near(wanted.outputs(), answer.outputs(), WIDE_TIE)


@pytest.mark.parametrize("name", SERVED)
def test_tokens(
    npu: EngineProcess, cpu: EngineProcess, quantised: QuantisedModels, name: str
) -> None:
    written = quantised(name)
    answer = npu.run(settings(written.path), RUN)
    assert answer.made_of["platform"] == "AscendNPUPlatform"
    for runs_as in SERVED[name]:
        assert f"runs as {runs_as} with" in answer.log
    caches = [FakeCache()] * written.offline.layers
    limit = QUANTISED_INPUTS if any("W8A8" in each for each in SERVED[name]) else TOLERANCE
    for prompt, output in zip(PROMPTS, answer.outputs(), strict=True):
        assert worst_difference(written.offline, caches, prompt, output) < limit
    _near(cpu, settings(written.path), answer)


@pytest.mark.parametrize("graphs", ["full and piecewise"])
@pytest.mark.parametrize("name", ["modelslim-mixed", "compressed-transforms"])
def test_graphs_give_the_tokens_of_the_eager_engine(
    npu: EngineProcess, quantised: QuantisedModels, name: str, graphs: str
) -> None:
    path = quantised(name).path
    eager, answer = npu.run(settings(path), RUN), npu.run(settings(path, graphs), RUN)
    assert_identical(eager.outputs(), answer.outputs())
    assert answer.made_of["graphs"]["captures"] == len(CAPTURED) * (2 + 2)
    assert answer.made_of["graphs"]["replays"] > 0
