"""Checkpoints that real tools wrote, on the NPU: what they mean, and the CPU platform's tokens."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from engines import EngineProcess
from npu_engines import assert_near, on_the_cpu, settings
from offline_llama import worst_difference
from quant_oracle import read_meaning
from real_checkpoints import NAMES, checkpoint, offline, prompts, runs_as

pytestmark = pytest.mark.engine

PROMPTS = prompts(5, 129)
RUN: dict[str, Any] = {"prompts": PROMPTS, "max_tokens": 6}

#: Logprobs in bfloat16 of a model whose inputs stay 16-bit, and of one whose are quantised.
TOLERANCE, QUANTISED_INPUTS = 0.15, 0.4

#: Quantised inputs differ by whole codes between platforms, so ties are wider.
WIDE_TIE = 0.15


@pytest.mark.parametrize("name", NAMES)
def test_tokens_and_logprobs(
    npu: EngineProcess, cpu: EngineProcess, real_base: Path, name: str
) -> None:
    meant = read_meaning(checkpoint(name))
    model, caches = offline(real_base, meant)
    engine = settings(str(checkpoint(name)), max_model_len=512)
    answer = npu.run(engine, RUN)
    assert answer.made_of["platform"] == "AscendNPUPlatform"
    assert f"runs as {runs_as(name)} with" in answer.log
    assert list(answer.counters) == (["c8s"] if meant.kv_scales else [])
    limit = QUANTISED_INPUTS if meant.fakes or meant.kv_scales else TOLERANCE
    for prompt, output in zip(PROMPTS, answer.outputs(), strict=True):
        off = worst_difference(model, caches, prompt, output)
        assert off < limit, f"{len(prompt)} tokens of prompt: off by {off}"
    wanted = cpu.run(on_the_cpu(engine), RUN)
    assert_near(wanted.outputs(), answer.outputs(), WIDE_TIE)
