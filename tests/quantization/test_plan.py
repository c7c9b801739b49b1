"""How modules run on a CPU and on an NPU, decided without either."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from implementations import forced, why_not
from quant_checkpoints import RECIPES, QuantisedModels

from ascend_plugin.quantization.formats import describe
from ascend_plugin.quantization.plan import Plan, plan
from ascend_plugin.quantization.report import module_rows
from ascend_plugin.quantization.scheme import Checkpoint, ModuleScheme
from ascend_plugin.quantization.target import Target


def _describe(path: str) -> Checkpoint:
    found = describe(Path(path))
    assert found is not None
    return found


@pytest.mark.parametrize("name", RECIPES)
def test_every_dense_checkpoint_has_a_plan(quantised: QuantisedModels, name: str) -> None:
    checkpoint = _describe(quantised(name).path)
    for target in Target:
        for row in module_rows(checkpoint, target):
            assert not row.note.startswith("not served")
            assert row.runs_as == "FLOAT" or row.scheme[:2] == row.runs_as[:2]


@pytest.mark.parametrize(
    ("name", "kernel"),
    [
        ("modelslim-w8a8", "static_quant, quant_matmul"),
        ("compressed-w8a8-static", "static_quant, quant_matmul"),
        ("compressed-w8a8-dynamic", "dynamic_quant, quant_matmul"),
    ],
)
def test_int8_on_a_cpu(quantised: QuantisedModels, name: str, kernel: str) -> None:
    module = _describe(quantised(name).path).modules["model.layers.0.mlp.down_proj"]
    wide = replace(module, k=65536, group=65536)
    other = kernel if module.integer_bias else "vLLM's oneDNN int8"
    for isa, expected in (("avx2", kernel), ("portable", other)):
        if why_not(f"native-{isa}") is None:
            with forced(f"native-{isa}"):
                assert plan(module).kernel.value == expected
                assert plan(wide).kernel.value == other


def _on_an_npu(quantised: QuantisedModels, name: str, module: str, model: str = "llama") -> Plan:
    checkpoint = _describe(quantised(name, model).path)
    return plan(checkpoint.modules[f"model.layers.0.{module}"], Target.NPU)


@pytest.mark.parametrize(
    ("name", "runs_as", "kernel"),
    [
        ("modelslim-w8a8", "W8A8", "npu_quantize, npu_quant_matmul"),
        ("modelslim-w8a8-dynamic", "W8A8_DYNAMIC", "npu_dynamic_quant, npu_quant_matmul"),
        ("compressed-w8a8-dynamic-asymmetric", "W8A16", "npu_weight_quant_batchmatmul"),
        ("modelslim-w8a8-dynamic-group", "W8A16", "npu_weight_quant_batchmatmul"),
        ("compressed-w4a8", "W4A16", "npu_weight_quant_batchmatmul"),
        ("awq", "W4A16", "npu_weight_quant_batchmatmul"),
    ],
)
def test_dense(quantised: QuantisedModels, name: str, runs_as: str, kernel: str) -> None:
    found = _on_an_npu(quantised, name, "mlp.down_proj")
    assert (found.runs_as, found.kernel.value) == (runs_as, kernel)
    same = runs_as == name.rpartition("-")[2].upper() or name in ("awq", "modelslim-w8a8-dynamic")
    assert bool(found.note) == (not same)


@pytest.mark.parametrize(
    ("name", "runs_as", "says"),
    [
        ("modelslim-w8a8-dynamic", "W8A8_DYNAMIC", ""),
        ("awq", "W4A16", ""),
        ("compressed-w4a16-channel", "W4A16", ""),
        ("modelslim-w8a16", "W8A16", ""),
        ("compressed-w8a16", "–", "8-bit weights with a scale per column only"),
        ("modelslim-w8a8", "–", "quantise them per token"),
        ("gptq-desc-act", "–", "desc_act"),
    ],
)
def test_experts(quantised: QuantisedModels, name: str, runs_as: str, says: str) -> None:
    found = _on_an_npu(quantised, name, "mlp.experts.3.up_proj", "qwen3_moe")
    assert found.runs_as == runs_as
    assert found.refused == bool(says)
    assert says in found.note


def test_limits_of_the_operators(quantised: QuantisedModels) -> None:
    module = _describe(quantised("awq").path).modules["model.layers.0.mlp.down_proj"]

    def note(**changes: int) -> str:
        changed: ModuleScheme = replace(module, **changes)
        return plan(changed, Target.NPU).note

    assert note(n=151936) == ""  # columns are multiplied in parts
    assert "at most 65535 are allowed" in note(k=65536)
    assert "20 output features of 4-bit codes" in note(n=20)
