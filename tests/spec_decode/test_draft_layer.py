"""MTP layers that do not fit their base are refused when the engine is configured."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from deepseek_mtp import write_deepseek_mtp
from safetensors.torch import load_file, save_file

from ascend_plugin.model.tiny import write_tiny_llama

Weights = dict[str, torch.Tensor]

DEEPSEEK, MIMO = "model.layers.2.", "model.mtp_layers.0."


def configure(path: Path, count: int = 2) -> object:
    from vllm import EngineArgs

    speculation = {"method": "mtp", "num_speculative_tokens": count}
    arguments = {"model": str(path), "skip_tokenizer_init": True, "max_model_len": 256}
    return EngineArgs(**arguments, speculative_config=speculation).create_engine_config()


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("models")
    shape = {"architecture": "mimo", "hidden": 256, "heads": 4, "kv_heads": 2, "head_dim": 64}
    return {
        "deepseek": Path(write_deepseek_mtp(folder / "deepseek")),
        "mimo": write_tiny_llama(folder / "mimo", dtype="float32", **shape),
    }


def changed(source: Path, path: Path, change: Callable[[Weights], None]) -> Path:
    """Write a model whose weights were changed."""
    shutil.copytree(source, path)
    weights = load_file(path / "model.safetensors")
    change(weights)
    save_file(weights, path / "model.safetensors", {"format": "pt"})
    return path


def without(*parts: str) -> Callable[[Weights], None]:
    """Drop tensors whose names have one of these parts."""

    def change(weights: Weights) -> None:
        for name in [name for name in weights if any(part in name for part in parts)]:
            del weights[name]

    return change


def resized(name: str, *shape: int) -> Callable[[Weights], None]:
    return lambda weights: weights.update({name: torch.zeros(shape)})


@pytest.mark.parametrize("name", ["deepseek", "mimo"])
def test_a_layer_that_fits_is_taken(models: dict[str, Path], name: str) -> None:
    assert configure(models[name], 4)


def test_copies_of_the_base_may_be_left_out(models: dict[str, Path], tmp_path: Path) -> None:
    change = without(DEEPSEEK + "embed_tokens", DEEPSEEK + "shared_head.head")
    assert configure(changed(models["deepseek"], tmp_path / "model", change))


def test_scales_of_the_cache_belong_to_the_base(models: dict[str, Path], tmp_path: Path) -> None:
    """ModelSlim calibrates the base alone."""
    change = resized("model.layers.1.self_attn.fa_k.scale", 1)
    assert configure(changed(models["deepseek"], tmp_path / "model", change))


def test_a_quantised_base_may_have_a_float_layer(models: dict[str, Path], tmp_path: Path) -> None:
    def quantise(weights: Weights) -> None:
        name = "model.layers.1.self_attn.o_proj.weight"
        weights[name] = weights[name].to(torch.int8)[:, ::2].contiguous()

    assert configure(changed(models["deepseek"], tmp_path / "model", quantise))


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("deepseek", without(DEEPSEEK), r"no tensor model\.layers\.2\.\*, although config\.json"),
        ("mimo", without(MIMO), r"no tensor model\.mtp_layers\.0\.\*, although config\.json"),
        ("deepseek", without("eh_proj"), r"model\.layers\.2\.eh_proj\.weight is missing"),
        ("mimo", without("token_layernorm"), r"0\.token_layernorm\.weight is missing"),
        (
            "deepseek",
            without(DEEPSEEK + "self_attn.kv_b_proj"),
            r"model\.layers\.2\.self_attn\.kv_b_proj\.weight is missing",
        ),
        ("deepseek", without(DEEPSEEK + "mlp.experts.7"), r"7\.\w+_proj\.weight is missing"),
        ("mimo", without(MIMO + "mlp"), r"mtp_layers\.0\.mlp\.\w+_proj\.weight is missing"),
        ("deepseek", without(DEEPSEEK + "mlp"), r"2\.mlp\.\S+\.weight is missing.*; and \d+ more"),
        (
            "deepseek",
            resized(DEEPSEEK + "eh_proj.weight", 64, 128),
            r"eh_proj\.weight is \[64, 128\], expected \[128, 256\] \(hidden size 128, voc",
        ),
        (
            "deepseek",
            resized(DEEPSEEK + "shared_head.head.weight", 300, 128),
            r"head\.weight is \[300, 128\], expected \[256, 128\] \(.*vocabulary 256\)",
        ),
        (
            "mimo",
            resized(MIMO + "self_attn.q_proj.weight", 128, 128),
            r"q_proj\.weight is \[128, 128\], expected \[256, 256\]",
        ),
    ],
)
def test_what_does_not_fit_is_named(
    models: dict[str, Path],
    tmp_path: Path,
    name: str,
    change: Callable[[Weights], None],
    message: str,
) -> None:
    path = changed(models[name], tmp_path / "model", change)
    with pytest.raises(ValueError, match=message) as error:
        configure(path)
    assert "leave --speculative-config out" in str(error.value)


@pytest.mark.parametrize("name", ["deepseek", "mimo"])
def test_a_configuration_without_a_layer_is_told(
    models: dict[str, Path], tmp_path: Path, name: str
) -> None:
    """vLLM divides by the number of layers."""
    path = tmp_path / "model"
    shutil.copytree(models[name], path)
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | {"num_nextn_predict_layers": 0}))
    with pytest.raises(ValueError, match="has no MTP layer"):
        configure(path)
