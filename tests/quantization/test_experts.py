"""Quantised experts on the CPU, against the float64 model that the checkpoint means."""

from __future__ import annotations

import pytest
from engines import EngineProcess
from offline_llama import FakeCache, worst_difference
from prompts import tokens
from quant_checkpoints import QuantisedModels
from tiny_engines import settings

pytestmark = pytest.mark.engine

PROMPTS = [tokens(length, seed=i) for i, length in enumerate((5, 40))]
RUN = {"prompts": PROMPTS, "max_tokens": 8}

#: As in test_engine.py: exact, but for codes of inputs that turn into their neighbours, which lie
#: farther apart where scales are static.
TOLERANCES = {
    "modelslim-w8a8-dynamic": 0.03,
    "modelslim-w8a8": 0.15,
    "modelslim-mixed": 0.15,
    "compressed-w8a8-dynamic": 0.03,
    "compressed-w4a16-group": 2e-3,
    "gptq-desc-act": 2e-3,
    "awq": 2e-3,
}


@pytest.mark.parametrize("name", TOLERANCES)
def test_tokens_and_logprobs(plugin: EngineProcess, quantised: QuantisedModels, name: str) -> None:
    written = quantised(name, "qwen3_moe")
    answer = plugin.run(settings(written.path), RUN)
    assert answer.made_of["platform"] == "AscendCPUPlatform"
    assert "model.layers.*.mlp.experts.*.up_proj ×16: W" in answer.log
    caches = [FakeCache()] * written.offline.layers
    for prompt, output in zip(PROMPTS, answer.outputs(), strict=True):
        assert worst_difference(written.offline, caches, prompt, output) < TOLERANCES[name]
