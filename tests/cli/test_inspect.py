"""``ascend-plugin inspect`` on checkpoints of several formats."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from quant_checkpoints import QuantisedModels
from tiny_engines import TinyModels


@pytest.fixture(scope="module")
def quantised(tmp_path_factory: pytest.TempPathFactory) -> QuantisedModels:
    folder = tmp_path_factory.mktemp("inspect")
    (folder / "float").mkdir()
    return QuantisedModels(folder, TinyModels(folder / "float"))


def test_json(run_cli, quantised: QuantisedModels) -> None:
    path = quantised("modelslim-mixed").path
    done = run_cli("inspect", path, "--json")
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    rows = {row["module"]: row for row in result["rows"]}
    assert len(rows) == 2 * 7 + 2
    gate = rows["model.layers.0.mlp.gate_proj"]
    assert (gate["scheme"], gate["runs_as"], gate["bits"]) == ("W8A8_DYNAMIC", "W8A8_DYNAMIC", 8)
    assert rows["lm_head"]["note"] == "described as FLOAT"
    assert result["meta"]["format"] == "modelslim"
    size = sum(file.stat().st_size for file in Path(path).glob("*.safetensors"))
    assert 0 < size - result["meta"]["bytes"] < 30_000
    assert {row["scheme"] for row in result["meta"]["memory"]} >= {"W8A8", "W4A16", "others"}


def test_table(run_cli, quantised: QuantisedModels) -> None:
    done = run_cli("inspect", quantised("compressed-w4a16-group").path)
    assert done.returncode == 0, done.stderr
    (line,) = [line for line in done.stdout.splitlines() if "self_attn.q_proj" in line]
    for part in (
        "model.layers.*",
        " 2 ",
        "W4A16",
        " 32 ",
        "256 × 128",
        "pack-quantized",
        "weight_",
    ):
        assert part in line
    (line,) = [line for line in done.stdout.splitlines() if line.startswith("lm_head")]
    assert "ignored by the recipe" in line


def test_for_an_npu(run_cli, quantised: QuantisedModels) -> None:
    """Experts too, and what the device would refuse."""
    done = run_cli("inspect", quantised("gptq-desc-act", "qwen3_moe").path, "--device", "npu")
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert " on an NPU" in lines[0]
    (line,) = [line for line in lines if "experts.*.up_proj" in line]
    assert " 16 " in line
    assert "not served on an NPU: groups in the order of activations" in line
    (line,) = [line for line in lines if "self_attn.q_proj" in line]
    assert "npu_weight_quant_batchmatmul" in line


def test_every_module(run_cli, quantised: QuantisedModels) -> None:
    done = run_cli("inspect", quantised("compressed-w4a16-group").path, "--all")
    assert done.stdout.count("self_attn.q_proj") == 2


def test_what_is_wrong_is_a_sentence(run_cli, quantised: QuantisedModels, tmp_path: Path) -> None:
    done = run_cli("inspect", tmp_path / "nothing")
    assert done.returncode == 1
    assert done.stderr.startswith("Error: ")
    assert "no such folder" in done.stderr
    assert "Traceback" not in done.stderr
    done = run_cli("inspect", Path(quantised("gptq").float_path))
    assert "not quantised" in done.stderr
