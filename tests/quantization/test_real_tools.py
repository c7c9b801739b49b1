"""Checkpoints that llm-compressor, msmodelslim, gptqmodel and auto-round really wrote.

Weights and engines against a model in float64 whose weights other code read from the same files.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from engines import EngineProcess
from offline_llama import worst_difference
from quant_oracle import read_meaning
from real_checkpoints import NAMES, checkpoint, offline, prompts, runs_as
from tiny_engines import settings

from ascend_plugin.quantization.formats import describe
from ascend_plugin.weight_tools.meaning import dequantise
from ascend_plugin.weight_tools.portable import read_module

PROMPTS = prompts(5, 40, 129)
RUN = {"prompts": PROMPTS, "max_tokens": 8}


@pytest.mark.parametrize("name", NAMES)
def test_weights(name: str) -> None:
    """The readers' codes, zero points and scales are the oracle's weights."""
    found = describe(checkpoint(name))
    assert found is not None
    meant = read_meaning(checkpoint(name))
    quantised = [module for module in found.modules.values() if module.quantised]
    assert len(quantised) == 14
    for about in quantised:
        weight = dequantise(read_module(found, about)).double()
        wanted = meant.weights[f"{about.name}.weight"]
        assert weight.shape == wanted.shape
        if about.rotations:
            # Rotations keep lengths.
            weight, wanted = weight.norm(dim=1), wanted.norm(dim=1)
        torch.testing.assert_close(weight, wanted, rtol=1e-6, atol=1e-9)


@pytest.mark.engine
@pytest.mark.parametrize("name", NAMES)
def test_tokens_and_logprobs(plugin: EngineProcess, real_base: Path, name: str) -> None:
    meant = read_meaning(checkpoint(name))
    model, caches = offline(real_base, meant)
    engine = settings(str(checkpoint(name)), max_model_len=512)
    answer = plugin.run(engine, RUN)
    assert f"runs as {runs_as(name)} with" in answer.log
    expected = "torch.int8" if meant.kv_scales else "torch.float32"
    assert answer.made_of["dtypes"] == [expected]
    assert list(answer.counters) == (["c8s"] if meant.kv_scales else [])
    # Codes of inputs and of the cache turn into their neighbours by a last bit.
    tolerance = 0.05 if meant.fakes or meant.kv_scales else 2e-3
    for prompt, output in zip(PROMPTS, answer.outputs(), strict=True):
        off = worst_difference(model, caches, prompt, output)
        assert off < tolerance, f"{len(prompt)} tokens of prompt: off by {off}"
