"""What the parsers say of checkpoints of every format, and the weights that come out of them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from quant_checkpoints import RECIPES, QuantisedModels, compressed_config, set_config

from ascend_plugin.quantization.formats import claims, describe
from ascend_plugin.quantization.report import module_rows, totals
from ascend_plugin.quantization.scheme import Scheme
from ascend_plugin.quantization.unpack import unpack


@pytest.mark.parametrize("name", RECIPES)
def test_weights(quantised: QuantisedModels, name: str) -> None:
    """Codes, zero points, scales and order give the weight that was written, to the last bit."""
    written = quantised(name)
    checkpoint = describe(Path(written.path))
    assert checkpoint is not None
    for module, made in written.made.items():
        about = checkpoint.modules[module]
        if about.scheme is Scheme.FLOAT or about.rotations:
            continue
        tensors = {role: checkpoint.index.read(info.name) for role, info in about.tensors.items()}
        codes = unpack(about, tensors)
        assert codes.codes.dtype == torch.int8
        assert codes.codes.shape == made.weight.shape == (about.n, about.k)
        scales = codes.scales
        if about.scheme is Scheme.W8A8 and about.source == "modelslim":
            scales = scales / tensors["input_scale"]
        group = torch.arange(about.k) // about.group
        zeros = 0 if codes.zeros is None else codes.zeros.double()[:, group]
        weight = (codes.codes.double() - zeros) * scales.double()[:, group]
        if codes.order is not None:
            weight = weight[:, torch.argsort(codes.order)]
        torch.testing.assert_close(weight, made.weight, rtol=2e-7, atol=0)


@pytest.mark.parametrize("name", RECIPES)
def test_every_matrix_is_accounted_for(quantised: QuantisedModels, name: str) -> None:
    checkpoint = describe(Path(quantised(name).path))
    assert checkpoint is not None
    rows = {row.module: row for row in module_rows(checkpoint)}
    assert {row.runs_as for row in rows.values()} == {*RECIPES[name].runs_as, "FLOAT"}
    for module in ("model.embed_tokens", *([] if RECIPES[name].lm_head else ["lm_head"])):
        assert rows[module].scheme == "FLOAT"
        assert rows[module].note
    size = sum(path.stat().st_size for path in Path(quantised(name).path).glob("*.safetensors"))
    accounted = sum(row.bytes for row in totals(checkpoint))
    assert 0 < size - accounted < 30_000  # the header


def test_rows_say_scheme_group_and_source(quantised: QuantisedModels) -> None:
    checkpoint = describe(Path(quantised("modelslim-mixed").path))
    assert checkpoint is not None
    rows = {row.module: row for row in module_rows(checkpoint)}
    up = rows["model.layers.0.mlp.up_proj"]
    assert (up.scheme, up.bits, up.group, up.runs_as) == ("W4A16", 4, None, "W4A16")
    assert up.source == "modelslim (W4A16)"
    key = rows["model.layers.1.self_attn.k_proj"]
    assert (key.scheme, key.note) == ("FLOAT", "described as FLOAT")
    grouped = describe(Path(quantised("gptq").path))
    assert grouped is not None
    assert {row.group for row in module_rows(grouped) if row.scheme != "FLOAT"} == {32}


@pytest.mark.parametrize(
    ("config", "claimed"),
    [
        (compressed_config(4, 32), "compressed-tensors"),
        ({"quant_method": "gptq", "bits": 4}, "gptq"),
        ({"quant_method": "awq"}, "awq"),
        ({"quant_method": "auto-round", "packing_format": "auto_round:auto_awq"}, "awq"),
        ({"quant_method": "intel/auto-round", "bits": 4}, "gptq"),
        ({"quant_method": "fp8"}, None),
        ({"quant_method": "gptq", "checkpoint_format": "marlin"}, None),
        (None, None),
    ],
)
def test_claims(config: dict | None, claimed: str | None) -> None:
    assert claims(config) == claimed


def test_floats_of_compressed_tensors_are_left_to_vllm() -> None:
    config = compressed_config(8)
    config["config_groups"]["group_0"]["weights"]["type"] = "float"
    assert claims(config) is None


def test_named_targets_come_before_linear(quantised: QuantisedModels, folder: Path) -> None:
    """As compressed-tensors does it, wherever the group stands."""
    import shutil

    shutil.copytree(quantised("compressed-k-float").path, folder)
    config = compressed_config(4, 32, ignore=["lm_head", "re:.*k_proj"])
    eight = compressed_config(8, 32)["config_groups"]["group_0"]
    config["config_groups"]["group_1"] = eight | {"targets": ["re:.*no_such_module"]}
    set_config(folder, config)
    checkpoint = describe(folder)
    assert checkpoint is not None
    assert checkpoint.modules["model.layers.0.mlp.up_proj"].bits == 4


def test_a_float_model_is_none(tiny, quantised: QuantisedModels) -> None:
    assert describe(Path(tiny("llama"))) is None


def test_quarot_rotations_are_read(quantised: QuantisedModels, folder: Path) -> None:
    import shutil

    from safetensors.torch import load_file, save_file

    shutil.copytree(quantised("modelslim-w8a8-dynamic").path, folder)
    file = next(folder.glob("*.safetensors"))
    weights = load_file(file)
    layer = "model.layers.0.self_attn.o_proj"
    weights[f"{layer}.heads_rotation"] = torch.eye(4)
    save_file(weights, file)
    path = folder / "quant_model_description.json"
    description = json.loads(path.read_text())
    description["metadata"] = {"quarot": {"heads_rotation": {"layers": [layer]}}}
    path.write_text(json.dumps(description))
    index = json.loads((folder / "quant_model_weights.safetensors.index.json").read_text())
    index["weight_map"][f"{layer}.heads_rotation"] = file.name
    (folder / "quant_model_weights.safetensors.index.json").write_text(json.dumps(index))
    checkpoint = describe(folder)
    assert checkpoint is not None
    (rotation,) = checkpoint.modules[layer].rotations
    assert (rotation.kind, rotation.block) == ("heads", 256)
    assert checkpoint.unused == {f"{layer}.heads_rotation"}
