"""Conversions keep what a checkpoint means, or refuse."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from quant_checkpoints import RECIPES, QuantisedModels
from real_checkpoints import NAMES, checkpoint
from safetensors.torch import load_file, save_file

from ascend_plugin.quantization.formats import describe
from ascend_plugin.quantization.scheme import Scheme
from ascend_plugin.weight_tools import WeightToolError
from ascend_plugin.weight_tools.convert import convert_checkpoint
from ascend_plugin.weight_tools.meaning import dequantise
from ascend_plugin.weight_tools.portable import PortableModule, read_module

#: What a format cannot say, by the words of the refusal.
REFUSED = {
    ("compressed-w8a8-dynamic-asymmetric", "modelslim"): "zero points per token",
    ("modelslim-w4a8-two-levels", "modelslim"): "one level of scales",
    ("gptq-desc-act", "modelslim"): "groups out of order",
    ("lc-w4a16-quip", "*"): "a rotation at run time",
    ("lc-w4a16-spinquant-r4", "*"): "a rotation at run time",
    ("gm-gptq-desc-act", "modelslim"): "groups out of order",
    ("ms-w8a8-c8", "compressed-tensors"): "a scale per channel",
}


def convert(source: str | Path, output: Path, form: str) -> Path:
    convert_checkpoint(Path(source), output, form, lambda *_: None)
    return output


def modules(folder: str | Path) -> dict[str, PortableModule]:
    found = describe(Path(folder))
    assert found is not None
    return {m.name: read_module(found, m) for m in found.modules.values() if m.quantised}


def assert_same(source: str | Path, made: Path) -> None:
    """Codes and zero points are equal, scales but for the rounding of ModelSlim's product."""
    before, after = modules(source), modules(made)
    assert before.keys() == after.keys()
    for name, old in before.items():
        new = after[name]
        assert torch.equal(old.codes, new.codes), name
        torch.testing.assert_close(
            dequantise(new).double(), dequantise(old).double(), rtol=3e-7, atol=0
        )
        if old.about.input is None:
            assert new.about.input is None
            continue
        assert new.about.input is not None
        assert old.about.input.dynamic == new.about.input.dynamic
        assert (old.static is None) == (new.static is None)
        if old.static is not None:
            assert new.static is not None
            assert (old.static.scale, old.static.zero) == (new.static.scale, new.static.zero)


def refusal(name: str, form: str) -> str | None:
    return REFUSED.get((name, form)) or REFUSED.get((name, "*"))


@pytest.mark.parametrize("form", ["compressed-tensors", "modelslim"])
@pytest.mark.parametrize("name", [name for name in RECIPES if not RECIPES[name].extra])
def test_meaning_is_kept(quantised: QuantisedModels, name: str, form: str, tmp_path: Path) -> None:
    source = quantised(name).path
    said = refusal(name, form)
    if said is not None:
        with pytest.raises(WeightToolError, match=re.escape(said)):
            convert(source, tmp_path / "made", form)
        assert list(tmp_path.iterdir()) == []
        return
    assert_same(source, convert(source, tmp_path / "made", form))


@pytest.mark.parametrize("form", ["compressed-tensors", "modelslim"])
@pytest.mark.parametrize("name", ["modelslim-mixed", "compressed-w4a16-group", "awq"])
def test_experts(quantised: QuantisedModels, name: str, form: str, tmp_path: Path) -> None:
    source = quantised(name, "qwen3_moe").path
    made = convert(source, tmp_path / "made", form)
    assert any(".experts." in module for module in modules(made))
    assert_same(source, made)


@pytest.mark.parametrize("form", ["compressed-tensors", "modelslim"])
@pytest.mark.parametrize("name", NAMES)
def test_real_checkpoints(name: str, form: str, tmp_path: Path) -> None:
    said = refusal(name, form)
    if said is not None:
        with pytest.raises(WeightToolError, match=re.escape(said)):
            convert(checkpoint(name), tmp_path / "made", form)
        return
    assert_same(checkpoint(name), convert(checkpoint(name), tmp_path / "made", form))


@pytest.mark.parametrize(
    ("name", "roles"),
    [
        ("ms-w8a8-dynamic", {"weight", "weight_scale", "weight_offset"}),
        ("ms-w4a8", {"weight", "weight_scale", "weight_offset", "scale_bias"}),
    ],
)
def test_there_and_back_is_what_msmodelslim_wrote(
    name: str, roles: set[str], tmp_path: Path
) -> None:
    """Our writer's tensors and types against the real tool's, name by name and bit by bit."""
    there = convert(checkpoint(name), tmp_path / "there", "compressed-tensors")
    back = convert(there, tmp_path / "back", "modelslim")
    made, real = (
        load_file(next(folder.glob("*.safetensors"))) for folder in (back, checkpoint(name))
    )
    assert made.keys() == real.keys()
    assert {key.rpartition(".")[2] for key in made if "_proj." in key} == roles
    for key, tensor in real.items():
        assert made[key].dtype == tensor.dtype, key
        torch.testing.assert_close(made[key], tensor, rtol=1e-5, atol=1e-6, msg=key)
    kinds = [
        json.loads((folder / "quant_model_description.json").read_text())
        for folder in (back, checkpoint(name))
    ]
    assert {key: kinds[0][key] for key in real} == {key: kinds[1][key] for key in real}
    # msmodelslim says FLOAT of a model with W4A8_DYNAMIC, a type that it hides.
    said = kinds[1]["model_quant_type"]
    assert kinds[0]["model_quant_type"] == ("W4A8_DYNAMIC" if name == "ms-w4a8" else said)


def test_static_inputs_as_msmodelslim_writes_them(tmp_path: Path) -> None:
    """``deq_scale`` and ``quant_bias`` come back from scales and offset to the last bit or one."""
    source = tmp_path / "source"
    source.mkdir()
    for path in checkpoint("ms-w8a8-c8").iterdir():
        if path.suffix != ".safetensors":
            (source / path.name).write_bytes(path.read_bytes())
    file = next(checkpoint("ms-w8a8-c8").glob("*.safetensors"))
    real = {k: t for k, t in load_file(file).items() if "kv_cache" not in k}
    save_file(real, source / file.name)
    for name in ("quant_model_description.json", "quant_model_weights.safetensors.index.json"):
        content = json.loads((source / name).read_text())
        inner = content.get("weight_map", content)
        for key in [key for key in inner if "kv_cache" in key]:
            del inner[key]
        (source / name).write_text(json.dumps(content))
    there = convert(source, tmp_path / "there", "compressed-tensors")
    made = load_file(next(convert(there, tmp_path / "back", "modelslim").glob("*.safetensors")))
    assert made.keys() == real.keys()
    for key, tensor in real.items():
        if key.endswith("deq_scale"):  # bits of float32 in int64
            assert made[key].dtype == tensor.dtype == torch.int64
            assert int((made[key] - tensor).abs().max()) <= 1
        else:
            assert torch.equal(made[key], tensor), key


@pytest.mark.parametrize("name", ["lc-w4a16-kv-tensor", "lc-w4a16-kv-head"])
def test_kv_scales(name: str, tmp_path: Path) -> None:
    """Scales per tensor and per head become the same scale of every channel."""
    made = convert(checkpoint(name), tmp_path / "made", "modelslim")
    found = describe(made)
    assert found is not None
    assert found.kv is not None
    assert (found.kv.kind, found.kv.layers) == ("C8", 2)
    scale = load_file(next(checkpoint(name).glob("*.safetensors")))[
        "model.layers.1.self_attn.v_scale"
    ]
    written = load_file(next(made.glob("*.safetensors")))[
        "model.layers.1.self_attn.v_proj.kv_cache_scale"
    ]
    assert torch.equal(written, scale.float().flatten().expand(64))
    again = convert(made, tmp_path / "again", "compressed-tensors")
    config = json.loads((again / "config.json").read_text())["quantization_config"]
    assert config["kv_cache_scheme"]["strategy"] == "attn_head"


def test_schemes_mixed_in_a_module(quantised: QuantisedModels, tmp_path: Path) -> None:
    made = convert(quantised("modelslim-mixed").path, tmp_path / "made", "compressed-tensors")
    found = describe(made)
    assert found is not None
    layer = {
        name.rpartition(".")[2]: found.modules[f"model.layers.0.{name}"].scheme
        for name in ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "mlp.up_proj")
    }
    assert layer == {
        "q_proj": Scheme.W8A8,
        "k_proj": Scheme.FLOAT,
        "v_proj": Scheme.W8A16,
        "up_proj": Scheme.W4A16,
    }


def test_refusals(tiny, quantised: QuantisedModels, tmp_path: Path) -> None:
    source = quantised("gptq").path
    with pytest.raises(WeightToolError, match=r"--format gguf is unknown; use one of compressed-"):
        convert(source, tmp_path / "made", "gguf")
    with pytest.raises(WeightToolError, match="exists; name another folder"):
        convert(source, tmp_path, "modelslim")
    with pytest.raises(WeightToolError, match="is not quantised in a way that is read here"):
        convert(tiny("llama"), tmp_path / "made", "modelslim")
    with pytest.raises(WeightToolError, match="has no config"):
        convert(tmp_path / "nothing", tmp_path / "made", "modelslim")
