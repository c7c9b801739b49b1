"""Checkpoints that are not what they say: the error names tensor, file, expectation and remedy."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from quant_checkpoints import QuantisedModels, compressed_config, set_config
from safetensors.torch import load_file, save_file

from ascend_plugin.quantization.errors import CheckpointError
from ascend_plugin.quantization.formats import describe
from ascend_plugin.quantization.unpack import unpack
from ascend_plugin.quantization.values import check_group_index, check_values

Q = "model.layers.0.self_attn.q_proj"
DOWN = "model.layers.1.mlp.down_proj"


@pytest.fixture
def broken(quantised: QuantisedModels, folder: Path) -> Callable[..., Path]:
    """Copy a checkpoint and change its tensors; None removes one."""

    def make(name: str, changes: dict[str, Any] | None = None) -> Path:
        shutil.copytree(quantised(name).path, folder)
        file = next(folder.glob("*.safetensors"))
        tensors = load_file(file)
        for tensor, change in (changes or {}).items():
            if change is None:
                del tensors[tensor]
            else:
                new = change(tensors.get(tensor)) if callable(change) else change
                tensors[tensor] = new.contiguous()
        save_file(tensors, file, {"format": "pt"})
        index = folder / "quant_model_weights.safetensors.index.json"
        if index.is_file():
            index.write_text(json.dumps({"weight_map": dict.fromkeys(tensors, file.name)}))
        return folder

    return make


def edit(path: Path, change: Callable[[dict], None]) -> None:
    """Change a JSON file in place."""
    value = json.loads(path.read_text())
    change(value)
    path.write_text(json.dumps(value))


def refused(folder: Path, *parts: str) -> None:
    """The checkpoint is refused, and the message has these parts and a remedy."""
    with pytest.raises(CheckpointError) as caught:
        describe(folder)
    message = str(caught.value)
    for part in (str(folder), *parts):
        assert part in message, message
    assert message.endswith(".")
    assert len(message.split(". ")) >= 2, message


@pytest.mark.parametrize(
    ("name", "tensor"),
    [
        ("modelslim-w8a8", "deq_scale"),
        ("modelslim-w8a8", "quant_bias"),
        ("modelslim-w8a8-dynamic", "weight_scale"),
        ("compressed-w4a16-group", "weight_scale"),
        ("compressed-w4a16-group-asymmetric", "weight_zero_point"),
        ("compressed-w8a8-static", "input_scale"),
        ("compressed-w8a8-static-asymmetric", "input_zero_point"),
        ("gptq", "qzeros"),
        ("gptq", "qweight"),
        ("awq", "scales"),
    ],
)
def test_missing_tensor(broken: Callable[..., Path], name: str, tensor: str) -> None:
    folder = broken(name, {f"{Q}.{tensor}": None})
    refused(folder, f"tensor {Q}.{tensor} is missing", "expected because", "again")


@pytest.mark.parametrize(
    ("name", "tensor", "change", "expected"),
    [
        ("modelslim-w8a8", "deq_scale", lambda t: t[:-1], "expected F32/I64 [256] or [256, 1]"),
        ("modelslim-w8a8", "quant_bias", lambda t: t.float(), "expected I32 [256]"),
        ("modelslim-w8a8", "weight", lambda t: t.float(), "expected I8 [output features"),
        ("modelslim-w8a8-dynamic", "weight_scale", lambda t: t[:7], "expected BF16/F16/F32 [256"),
        ("modelslim-w4a16", "weight", lambda t: t[:100], "expected I8 [256, input features]"),
        ("compressed-w4a16-group", "weight_scale", lambda t: t[:, :1], "[256, 4]"),
        ("compressed-w4a16-group-asymmetric", "weight_zero_point", lambda t: t[:1], "[32, 2]"),
        ("compressed-w8a8-static", "input_scale", lambda t: t.repeat(3), "[] or [1] or [1, 1]"),
        ("gptq", "scales", lambda t: t[:1], "expected BF16/F16/F32 [4, 256]"),
        ("gptq", "g_idx", lambda t: t[:5], "expected I32/I64 [128]"),
        ("awq", "qzeros", lambda t: t[:, :4], "expected I32 [4, 32]"),
    ],
)
def test_wrong_shape_or_type(
    broken: Callable[..., Path], name: str, tensor: str, change: Callable, expected: str
) -> None:
    folder = broken(name, {f"{Q}.{tensor}": change})
    file = next(folder.glob("*.safetensors")).name
    refused(folder, file, f"tensor {Q}.{tensor} is", expected, Q)


def test_unknown_type(broken: Callable[..., Path]) -> None:
    folder = broken("modelslim-w8a8")
    path = folder / "quant_model_description.json"
    edit(path, lambda d: d.update({f"{Q}.weight": "W3A5"}))
    refused(folder, path.name, f"tensor {Q}.weight is 'W3A5'", "allowed here: W8A8", "W4A16")


def test_described_but_absent(broken: Callable[..., Path]) -> None:
    folder = broken("modelslim-w8a8")
    path = folder / "quant_model_description.json"
    edit(path, lambda d: d.update({"model.layers.9.mlp.up_proj.weight": "W8A8"}))
    refused(folder, "tensor model.layers.9.mlp.up_proj.weight is missing", "says that it is W8A8")


def test_one_module_of_two_types(broken: Callable[..., Path]) -> None:
    folder = broken("modelslim-w8a8")
    edit(
        folder / "quant_model_description.json",
        lambda d: d.update({f"{Q}.deq_scale": "W8A8_DYNAMIC"}),
    )
    refused(folder, f"{Q}.deq_scale", f"{Q}.weight is W8A8", "is W8A8_DYNAMIC", "one type")


def test_described_as_float_but_integer(broken: Callable[..., Path]) -> None:
    folder = broken("modelslim-w8a8-dynamic")

    def change(description: dict) -> None:
        for role in ("weight", "weight_scale", "weight_offset"):
            description[f"{Q}.{role}"] = "FLOAT"

    edit(folder / "quant_model_description.json", change)
    refused(folder, f"tensor {Q}.weight is I8", "expected BF16/F16/F32", "FLOAT")


def test_not_described_but_integer(broken: Callable[..., Path]) -> None:
    folder = broken("modelslim-w8a8-dynamic")

    def change(description: dict) -> None:
        for role in ("weight", "weight_scale", "weight_offset"):
            del description[f"{Q}.{role}"]

    edit(folder / "quant_model_description.json", change)
    refused(folder, f"tensor {Q}.weight", "holds it as I8", "does not list it")


def test_description_is_no_json(broken: Callable[..., Path]) -> None:
    folder = broken("modelslim-w8a8")
    (folder / "quant_model_description.json").write_text('{"a": ')
    refused(folder, "quant_model_description.json", "expected a JSON object")


def test_group_size_and_scales_disagree(broken: Callable[..., Path]) -> None:
    folder = broken("modelslim-w8a16-group-asymmetric")
    edit(folder / "quant_model_description.json", lambda d: d.update(group_size=64))
    refused(folder, ".weight_scale", "group_size 64", "(32)")


def test_bias_of_a_norm(broken: Callable[..., Path]) -> None:
    name = "model.layers.0.input_layernorm.bias"
    folder = broken("modelslim-w8a8", {name: torch.zeros(128)})
    edit(folder / "quant_model_description.json", lambda d: d.update({name: "FLOAT"}))
    refused(folder, name, "bias of a norm", "expected none", "anti-outlier")


def test_target_that_is_float(broken: Callable[..., Path]) -> None:
    folder = broken("compressed-k-float")
    set_config(folder, compressed_config(4, 32))
    refused(folder, "k_proj.weight", "it is F32, not quantised", "group_0", "'ignore'")


def test_ignored_but_quantised(broken: Callable[..., Path]) -> None:
    folder = broken("compressed-w4a16-group")
    set_config(folder, compressed_config(4, 32, ignore=["lm_head", Q]))
    refused(folder, f"tensor {Q}.weight_packed", "ignored by the recipe", "quantised module")


def test_packed_shape_disagrees(broken: Callable[..., Path]) -> None:
    folder = broken(
        "compressed-w4a16-group", {f"{Q}.weight_shape": lambda t: torch.tensor([256, 999])}
    )
    refused(folder, f"{Q}.weight_packed", f"{Q}.weight_shape says", "[256, 999]")


@pytest.mark.parametrize(
    ("part", "key", "value", "allowed"),
    [
        ("weights", "num_bits", 3, "4, 8"),
        ("weights", "strategy", "block", "tensor, channel, group"),
        ("input_activations", "num_bits", 4, "8"),
        ("input_activations", "strategy", "tensor", "token"),
    ],
)
def test_unknown_compressed_values(
    broken: Callable[..., Path], part: str, key: str, value: Any, allowed: str
) -> None:
    folder = broken("compressed-w8a8-dynamic")

    def change(config: dict) -> None:
        args = config["quantization_config"]["config_groups"]["group_0"][part]
        args[key] = value
        if value == "block":
            args["block_structure"] = [128, 128]

    edit(folder / "config.json", change)
    refused(folder, f"config_groups.group_0.{part}.{key}", repr(value), f"allowed here: {allowed}")


def test_group_that_does_not_divide(broken: Callable[..., Path]) -> None:
    folder = broken("gptq")
    edit(folder / "config.json", lambda c: c["quantization_config"].update(group_size=96))
    refused(folder, ".qweight", "256 input features", "groups of 96", "group size that divides 256")


def test_compressed_group_that_does_not_divide(broken: Callable[..., Path]) -> None:
    folder = broken("compressed-w4a16-group")
    set_config(folder, compressed_config(4, 48))
    refused(folder, ".weight_packed", "groups of 48", "divide")


def test_gptq_bits(broken: Callable[..., Path]) -> None:
    folder = broken("gptq")
    edit(folder / "config.json", lambda c: c["quantization_config"].update(bits=3))
    refused(folder, "config.json", "bits of model.layers", "is 3", "allowed here: 4, 8")


def test_gptq_excludes_what_it_quantised(broken: Callable[..., Path]) -> None:
    folder = broken("gptq")
    edit(
        folder / "config.json",
        lambda c: c["quantization_config"].update(dynamic={"-:.*o_proj": {}}),
    )
    refused(folder, "o_proj", "excluded from quantisation", ".qweight")


def test_awq_version(broken: Callable[..., Path]) -> None:
    folder = broken("awq")
    edit(folder / "config.json", lambda c: c["quantization_config"].update(version="gemv"))
    refused(folder, "version", "'gemv'", "allowed here: gemm")


def test_says_quantised_but_is_not(broken: Callable[..., Path], tiny: Any) -> None:
    folder = broken("gptq")
    shutil.copy(Path(tiny("llama")) / "model.safetensors", folder)
    refused(folder, "says that the checkpoint is quantised", "qweight")


def test_truncated_file(broken: Callable[..., Path]) -> None:
    folder = broken("compressed-w4a16-group")
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    refused(folder, "model.safetensors", "truncated", "tensor ", "expected", "Copy or download")


def test_file_of_nothing(broken: Callable[..., Path]) -> None:
    folder = broken("compressed-w4a16-group")
    (folder / "model.safetensors").write_bytes(b"version https://git-lfs.github.com/spec/v1\n")
    refused(folder, "model.safetensors", "no safetensors file")


def test_shards_that_disagree(broken: Callable[..., Path]) -> None:
    folder = broken("compressed-w4a16-group")
    save_file({f"{Q}.weight_scale": torch.ones(3)}, folder / "other.safetensors")
    refused(folder, f"tensor {Q}.weight_scale", "model.safetensors", "other.safetensors", "Remove")


def test_index_and_shards_disagree(broken: Callable[..., Path]) -> None:
    folder = broken("compressed-w4a16-group")
    index = {"weight_map": {"model.norm.bias": "model.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    refused(folder, "model.norm.bias", "the index says", "model.safetensors", "no file does")


def test_shard_is_missing(broken: Callable[..., Path]) -> None:
    folder = broken("compressed-w4a16-group")
    index = {"weight_map": {"model.norm.weight": "model-00002-of-00002.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    refused(folder, "model-00002-of-00002.safetensors", "cannot be read")


def test_no_safetensors(broken: Callable[..., Path]) -> None:
    folder = broken("gptq")
    (folder / "model.safetensors").rename(folder / "model.bin")
    refused(folder, "no *.safetensors file", "convert")


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_scales_that_are_no_numbers(broken: Callable[..., Path], bad: float) -> None:
    def change(scales: torch.Tensor) -> torch.Tensor:
        scales[0, 0] = bad
        return scales

    checkpoint = describe(broken("awq", {f"{Q}.scales": change}))
    module = checkpoint.modules[Q]
    tensors = {role: checkpoint.index.read(info.name) for role, info in module.tensors.items()}
    with pytest.raises(CheckpointError, match=rf"{Q}.scales has the scale .*expected finite"):
        check_values(module, unpack(module, tensors))


def test_codes_beyond_four_bits(broken: Callable[..., Path]) -> None:
    checkpoint = describe(broken("compressed-w4a8", {f"{Q}.weight": lambda t: t * 3}))
    module = checkpoint.modules[Q]
    tensors = {role: checkpoint.index.read(info.name) for role, info in module.tensors.items()}
    with pytest.raises(CheckpointError, match=rf"{Q}.weight has codes .*expected 4-bit codes"):
        check_values(module, unpack(module, tensors))


def test_group_index_of_unequal_groups(broken: Callable[..., Path]) -> None:
    checkpoint = describe(broken("gptq-desc-act", {f"{Q}.g_idx": lambda t: t * 0}))
    module = checkpoint.modules[Q]
    with pytest.raises(CheckpointError, match=rf"{Q}.g_idx has groups .*expected 4 groups of 32"):
        check_group_index(module, checkpoint.index.read(f"{Q}.g_idx"))
