"""Checkpoints in transformers against offline models with the checkpoint's meaning."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from offline_llama import FakeCache
from prompts import tokens
from quant_checkpoints import RECIPES, QuantisedModels

from ascend_plugin.weight_tools import WeightToolError
from ascend_plugin.weight_tools.layers import find_rotation
from ascend_plugin.weight_tools.meaning import load_meaning

PROMPT = tokens(60, seed=4)

#: Checkpoints of a model with experts: inputs 16-bit, per token, static; types mixed in an expert.
WITH_EXPERTS = (
    "compressed-w4a16-group",
    "awq",
    "compressed-w8a8-dynamic",
    "modelslim-w8a8",
    "modelslim-mixed",
)


@pytest.mark.parametrize("name", RECIPES)
def test_logprobs(quantised: QuantisedModels, name: str) -> None:
    written = quantised(name)
    model, _ = load_meaning(Path(written.path), torch.float32)
    with torch.no_grad():
        found = model(input_ids=torch.tensor([PROMPT])).logits[0].log_softmax(-1)
    wanted = written.offline.logprobs(PROMPT, [FakeCache()] * written.offline.layers)
    off = float((found - wanted).abs().max())
    # Quantised inputs: a last bit turns codes into their neighbours. W4A8 runs with them here.
    fake = any(made.fake for made in written.made.values())
    inputs = fake or name in ("modelslim-w4a8", "modelslim-w4a8-two-levels", "compressed-w4a8")
    inputs = inputs or name == "modelslim-w8a8-dynamic-group"
    assert off < (0.5 if inputs else 2e-3), off


@pytest.mark.parametrize("name", WITH_EXPERTS)
def test_logprobs_of_experts(quantised: QuantisedModels, name: str) -> None:
    written = quantised(name, "qwen3_moe")
    model, checkpoint = load_meaning(Path(written.path), torch.float32)
    assert any(".experts." in module for module in checkpoint.modules)
    with torch.no_grad():
        found = model(input_ids=torch.tensor([PROMPT])).logits[0].log_softmax(-1)
    wanted = written.offline.logprobs(PROMPT, [FakeCache()] * written.offline.layers)
    off = float((found - wanted).abs().max())
    assert off < (0.5 if any(made.fake for made in written.made.values()) else 2e-3), off


def test_experts_that_do_not_fit(quantised: QuantisedModels, tmp_path: Path) -> None:
    folder = tmp_path / "checkpoint"
    shutil.copytree(quantised("compressed-w4a16-group", "qwen3_moe").path, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"num_experts": 17}))
    with pytest.raises(WeightToolError, match=r"no model.layers.0.mlp.experts.8.gate_proj; the "):
        load_meaning(folder, torch.float32)


def test_a_float_model_has_no_meaning_here(tiny) -> None:
    with pytest.raises(WeightToolError, match="is not quantised in a way that is read here"):
        load_meaning(Path(tiny("llama")), torch.float32)


def test_rotations_of_the_residual_stream() -> None:
    generator = torch.Generator().manual_seed(0)
    base = torch.randn(300, 64, generator=generator)
    turn = torch.linalg.qr(torch.randn(64, 64, generator=generator))[0]
    assert find_rotation(base, base) is None
    assert find_rotation(base, base.bfloat16().float()) is None
    found = find_rotation(base, (base @ turn).bfloat16())
    assert found is not None
    torch.testing.assert_close(found, turn, atol=2e-2, rtol=0)
    with pytest.raises(WeightToolError, match="nor a rotation of them"):
        find_rotation(base, torch.randn(300, 64, generator=generator))
    with pytest.raises(WeightToolError, match="made from another model"):
        find_rotation(base, base[:200])
