"""Tiny quantised checkpoints of every format, and the model that each of them means."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from offline_llama import OfflineLlama
from quant_modules import (
    Fake,
    Made,
    Maker,
    awq,
    compressed_int,
    compressed_packed,
    gptq,
    modelslim_float,
    modelslim_scaled,
    modelslim_static,
    modelslim_two_levels,
    random_hadamard,
    rotated,
    sylvester,
)
from safetensors.torch import load_file, save_file

LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True, slots=True, eq=False)
class Recipe:
    """How a checkpoint is written.

    Attributes:
        make: what quantises a module, by its name; None: it stays float.
        config: ``quantization_config``; None: ModelSlim.
        runs_as: what the plugin must say that it runs.
        description: further keys of ModelSlim's description.
        extra: tensors that belong to no module.
        lm_head: whether the output embedding is quantised too.
    """

    make: Callable[[str], Maker | None]
    config: dict[str, Any] | None
    runs_as: tuple[str, ...]
    description: dict[str, Any] = field(default_factory=dict)
    extra: dict[str, torch.Tensor] = field(default_factory=dict)
    lm_head: bool = False


@dataclass(slots=True, eq=False)
class Written:
    """A checkpoint and the model that it means."""

    path: str
    made: dict[str, Made]
    offline: OfflineLlama
    float_path: str


class FakeLinear:
    """A weight of the offline model whose input is quantised first."""

    def __init__(self, weight: torch.Tensor, fake: Fake) -> None:
        self._weight, self._fake = weight, fake

    @property
    def T(self) -> FakeLinear:
        return self

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, arguments: Any, kwargs: Any = None):
        x, linear = arguments
        return linear._fake(x) @ linear._weight.T


def write(recipe: Recipe, float_model: str, folder: Path) -> Written:
    """Write a checkpoint made from a float model, and the float model that it means."""
    weights = load_file(Path(float_model) / "model.safetensors")
    folder.mkdir()
    shutil.copy(Path(float_model) / "config.json", folder)
    tensors, made, types = {}, {}, {}
    for name, weight in weights.items():
        module, _, role = name.rpartition(".")
        linear = (*LINEAR, "lm_head") if recipe.lm_head else LINEAR
        maker = recipe.make(module) if module.rpartition(".")[2] in linear else None
        if maker is None or role != "weight":
            tensors[name], types[name] = weight, "FLOAT"
            continue
        made[module] = maker(weight, weights.get(f"{module}.bias"), module)
        for part, tensor in made[module].tensors.items():
            tensors[f"{module}.{part}"] = tensor
            types[f"{module}.{part}"] = made[module].types.get(part, "FLOAT")
    _save(recipe, folder, tensors | recipe.extra, types)
    dequantised = {
        name: made[name.removesuffix(".weight")].weight.float()
        if name.removesuffix(".weight") in made and name.endswith(".weight")
        else tensor
        for name, tensor in weights.items()
    }
    meant = folder.with_name(f"{folder.name}-float")
    meant.mkdir()
    shutil.copy(Path(float_model) / "config.json", meant)
    save_file(dequantised, meant / "model.safetensors", {"format": "pt"})
    return Written(str(folder), made, _offline(str(meant), made), str(meant))


def _save(recipe: Recipe, folder: Path, tensors: dict, types: dict[str, str]) -> None:
    if recipe.config is None:
        save_file(tensors, folder / "quant_model_weights-00001-of-00001.safetensors")
        index = {"metadata": {}, "weight_map": {}}
        for name in tensors:
            index["weight_map"][name] = "quant_model_weights-00001-of-00001.safetensors"
        (folder / "quant_model_weights.safetensors.index.json").write_text(json.dumps(index))
        about = {"version": "1.0.0", "model_quant_type": "W8A8", "metadata": {}, "optional": {}}
        description = types | about | recipe.description
        (folder / "quant_model_description.json").write_text(json.dumps(description))
        return
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    set_config(folder, recipe.config)


def set_config(folder: Path, quantization_config: dict[str, Any]) -> None:
    """Replace the ``quantization_config`` of a checkpoint."""
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = quantization_config
    (folder / "config.json").write_text(json.dumps(config))


def _offline(path: str, made: dict[str, Made]) -> OfflineLlama:
    offline = OfflineLlama(path)
    for module, about in made.items():
        offline.weights[f"{module}.weight"] = about.weight
        if about.fake is not None:
            offline.weights[f"{module}.weight"] = FakeLinear(about.weight, about.fake)
    return offline


def _all(maker: Maker) -> Callable[[str], Maker | None]:
    return lambda module: maker


def compressed_config(
    bits: int,
    group: int | None = None,
    symmetric: bool = True,
    inputs: dict[str, Any] | None = None,
    **more: Any,
) -> dict[str, Any]:
    """Return a ``quantization_config`` as llm-compressor writes it."""
    packed = inputs is None
    weights = {
        "num_bits": bits,
        "type": "int",
        "symmetric": symmetric,
        "strategy": "group" if group else "channel",
        "group_size": group,
        "dynamic": False,
        "actorder": None,
        "block_structure": None,
        "observer": "minmax",
        "observer_kwargs": {},
        "scale_dtype": None,  # newer than the compressed-tensors beside vLLM
        "zp_dtype": "torch.int8",
    }
    kind = "pack-quantized" if packed else "int-quantized"
    return {
        "quant_method": "compressed-tensors",
        "format": kind,
        "quantization_status": "compressed",
        "global_compression_ratio": None,
        "kv_cache_scheme": None,
        "ignore": ["lm_head", "re:.*mlp[.]gate$"],
        "version": "0.19.0",
        "sparsity_config": {},
        "transform_config": {},
        "config_groups": {
            "group_0": {
                "targets": ["Linear"],
                "weights": weights,
                "input_activations": inputs,
                "output_activations": None,
                "format": kind,
            }
        },
        **more,
    }


def _inputs(dynamic: bool, symmetric: bool = True) -> dict[str, Any]:
    return {
        "num_bits": 8,
        "type": "int",
        "symmetric": symmetric,
        "strategy": "token" if dynamic else "tensor",
        "dynamic": dynamic,
        "group_size": None,
    }


def _gptq_config(bits: int, group: int, symmetric: bool, **more: Any) -> dict[str, Any]:
    return {
        "quant_method": "gptq",
        "bits": bits,
        "group_size": group,
        "sym": symmetric,
        "desc_act": False,
        "checkpoint_format": "gptq",
        "lm_head": False,
        "pack_dtype": "int32",
        "dynamic": {},
        **more,
    }


_AWQ = {"quant_method": "awq", "bits": 4, "group_size": 32, "zero_point": True, "version": "gemm"}
_AUTO_ROUND = {"quant_method": "auto-round", "bits": 4, "group_size": 32, "data_type": "int"}


def _mixed(module: str) -> Maker | None:
    """Give the modules of fused layers different schemes."""
    makers = {
        "q_proj": modelslim_static(),
        "k_proj": modelslim_float,
        "v_proj": modelslim_scaled("W8A16", 8),
        "gate_proj": modelslim_scaled("W8A8_DYNAMIC", 8),
        "up_proj": modelslim_scaled("W4A16", 4, packing="in"),
        "o_proj": modelslim_scaled("W8A8_DYNAMIC", 8),
        "down_proj": modelslim_float,
    }
    return makers[module.rpartition(".")[2]]


def _skip_k(module: str) -> Maker | None:
    return None if module.endswith("k_proj") else compressed_packed(4, 32, True)


RECIPES: dict[str, Recipe] = {
    "modelslim-w8a8": Recipe(_all(modelslim_static()), None, ("W8A8",)),
    "modelslim-w8a8-int64": Recipe(_all(modelslim_static(torch.int64)), None, ("W8A8",)),
    "modelslim-w8a8-dynamic": Recipe(
        _all(modelslim_scaled("W8A8_DYNAMIC", 8)), None, ("W8A8_DYNAMIC",)
    ),
    "modelslim-w8a8-dynamic-group": Recipe(
        _all(modelslim_scaled("W8A8_DYNAMIC", 8, 32)), None, ("W8A16",), {"group_size": 32}
    ),
    "modelslim-w8a8-mix": Recipe(_all(modelslim_static(mixed=True)), None, ("W8A8_DYNAMIC",)),
    "modelslim-w8a16": Recipe(_all(modelslim_scaled("W8A16", 8)), None, ("W8A16",)),
    "modelslim-w8a16-group-asymmetric": Recipe(
        _all(modelslim_scaled("W8A16", 8, 32, False)), None, ("W8A16",), {"group_size": 32}
    ),
    "modelslim-w4a16": Recipe(_all(modelslim_scaled("W4A16", 4, packing="in")), None, ("W4A16",)),
    "modelslim-w4a16-group-asymmetric": Recipe(
        _all(modelslim_scaled("W4A16", 4, 32, False, packing="out")),
        None,
        ("W4A16",),
        {"group_size": 32},
    ),
    "modelslim-w4a8": Recipe(
        _all(modelslim_scaled("W4A8_DYNAMIC", 4, packing="out")), None, ("W4A16",)
    ),
    "modelslim-w4a8-two-levels": Recipe(
        _all(modelslim_two_levels(32)), None, ("W4A16",), {"group_size": 32}
    ),
    "modelslim-mixed": Recipe(_mixed, None, ("W8A8", "FLOAT", "W8A16", "W8A8_DYNAMIC", "W4A16")),
    "compressed-w8a8-static": Recipe(
        _all(compressed_int(8, static=True)), compressed_config(8, inputs=_inputs(False)), ("W8A8",)
    ),
    "compressed-w8a8-static-asymmetric": Recipe(
        _all(compressed_int(8, static=True, symmetric=False)),
        compressed_config(8, inputs=_inputs(False, False)),
        ("W8A8",),
    ),
    "compressed-w8a8-dynamic": Recipe(
        _all(compressed_int(8)), compressed_config(8, inputs=_inputs(True)), ("W8A8_DYNAMIC",)
    ),
    "compressed-w8a8-dynamic-asymmetric": Recipe(
        _all(compressed_int(8, symmetric=False)),
        compressed_config(8, inputs=_inputs(True, False)),
        ("W8A8_DYNAMIC",),
    ),
    "compressed-w4a16-group": Recipe(
        _all(compressed_packed(4, 32, True)), compressed_config(4, 32), ("W4A16",)
    ),
    "compressed-w4a16-group-asymmetric": Recipe(
        _all(compressed_packed(4, 64, False)), compressed_config(4, 64, False), ("W4A16",)
    ),
    "compressed-w4a16-channel": Recipe(
        _all(compressed_packed(4, None, True)), compressed_config(4), ("W4A16",)
    ),
    "compressed-w4a16-channel-asymmetric": Recipe(
        _all(compressed_packed(4, None, False)), compressed_config(4, None, False), ("W4A16",)
    ),
    "compressed-w8a16": Recipe(
        _all(compressed_packed(8, 32, True)), compressed_config(8, 32), ("W8A16",)
    ),
    "compressed-w4a8": Recipe(
        _all(compressed_int(4)), compressed_config(4, inputs=_inputs(True)), ("W4A16",)
    ),
    "compressed-k-float": Recipe(
        _skip_k, compressed_config(4, 32, ignore=["lm_head", "re:.*k_proj"]), ("W4A16", "FLOAT")
    ),
    "compressed-lm-head": Recipe(
        _all(compressed_packed(4, 32, False)),
        compressed_config(4, 32, False, ignore=[]),
        ("W4A16",),
        lm_head=True,
    ),
    "gptq": Recipe(_all(gptq(4, 32, True)), _gptq_config(4, 32, True), ("W4A16",)),
    "gptq-asymmetric": Recipe(_all(gptq(4, 32, False)), _gptq_config(4, 32, False), ("W4A16",)),
    "gptq-v2-asymmetric": Recipe(
        _all(gptq(4, 32, False, version=2)),
        _gptq_config(4, 32, False, checkpoint_format="gptq_v2"),
        ("W4A16",),
    ),
    "gptq-desc-act": Recipe(
        _all(gptq(4, 32, True, act_order=True)),
        _gptq_config(4, 32, True, desc_act=True),
        ("W4A16",),
    ),
    "gptq-8-bit-channel": Recipe(_all(gptq(8, None, True)), _gptq_config(8, -1, True), ("W8A16",)),
    "gptq-dynamic": Recipe(
        lambda module: (
            None
            if module.endswith("v_proj")
            else gptq(8 if module.endswith("down_proj") else 4, 32, True)
        ),
        _gptq_config(4, 32, True, dynamic={"-:.*v_proj": {}, "+:.*down_proj": {"bits": 8}}),
        ("W4A16", "W8A16", "FLOAT"),
    ),
    "awq": Recipe(_all(awq(32)), _AWQ, ("W4A16",)),
    "awq-channel": Recipe(_all(awq(None)), _AWQ | {"group_size": -1}, ("W4A16",)),
    "auto-round-gptq": Recipe(
        _all(gptq(4, 32, True)),
        _AUTO_ROUND | {"sym": True, "packing_format": "auto_round:auto_gptq"},
        ("W4A16",),
    ),
    "auto-round-awq": Recipe(
        lambda module: None if module.endswith("o_proj") else awq(32),
        _AUTO_ROUND
        | {
            "sym": False,
            "packing_format": "auto_round:auto_awq",
            "extra_config": {".*o_proj.*": {"bits": 16, "data_type": "float"}},
        },
        ("W4A16", "FLOAT"),
    ),
}


_RANDOM = random_hadamard(64)


def _transformed(module: str) -> Maker | None:
    """Rotate as SpinQuant's R4 and QuIP do: whole inputs, blocks of inputs, and outputs."""
    base = compressed_packed(4, 32, True)
    last = module.rpartition(".")[2]
    if last == "down_proj":
        return rotated(base, "input", sylvester(256) / 16)
    if last == "o_proj":
        return rotated(base, "input", _RANDOM / 8)
    if last in ("q_proj", "k_proj", "v_proj"):
        make = rotated(base, "input", _RANDOM.T.contiguous() / 8)
        return rotated(make, "output", sylvester(64) / 8) if last == "v_proj" else make
    return base


def _apply(targets: str, location: str, **more: Any) -> dict[str, Any]:
    return {"targets": [targets], "location": location, "inverse": False, "ignore": []} | more


def _transform(kind: str, *apply: dict[str, Any], **more: Any) -> dict[str, Any]:
    about = {"type": kind, "randomize": False, "requires_grad": False, "head_dim": None}
    return about | {"precision": "torch.float32", "apply": list(apply)} | more


_TRANSFORMS = {
    "R1": _transform(
        "hadamard", _apply("re:.*embed_tokens$", "weight_output"), _apply("lm_head", "weight_input")
    ),
    "R3": _transform("hadamard", _apply("re:.*self_attn$", "k_cache"), head_dim=64),
    "R4": _transform(
        "hadamard",
        _apply("re:.*down_proj$", "input"),
        _apply("re:.*down_proj$", "weight_input", inverse=True),
    ),
    "v": _transform("random-hadamard", _apply("re:.*o_proj$", "input"), head_dim=64),
    "w": _transform(
        "random-hadamard", _apply("re:.*[qkv]_proj$", "input", inverse=True), head_dim=64
    ),
    "u": _transform("hadamard", _apply("re:.*v_proj$", "output"), head_dim=64),
}

_M, _N = sylvester(4) / 2, random_hadamard(64, seed=5) / 8


def _quarot(module: str) -> Maker | None:
    base = modelslim_scaled("W8A8_DYNAMIC", 8)
    last = module.rpartition(".")[2]
    if last == "o_proj":
        heads = torch.kron(random_hadamard(4) / 2, torch.eye(64, dtype=torch.float64))
        return rotated_input_fake(base, heads)
    if last == "down_proj":
        return rotated_input_fake(base, torch.kron(_M, _N))
    return base


def rotated_input_fake(maker: Maker, block: torch.Tensor) -> Maker:
    """Quantise a weight behind a rotation of its input, which is quantised after it."""
    rotate = rotated(maker, "input", block)

    def make(weight: torch.Tensor, bias: torch.Tensor | None, name: str) -> Made:
        made = rotate(weight, bias, name)
        whole = torch.block_diag(*[block] * (weight.shape[1] // block.shape[0]))
        fake = made.fake
        assert fake is not None
        made.fake = lambda x: fake(x @ whole) @ whole.T
        return made

    return make


_LAYERS = [f"model.layers.{i}" for i in range(2)]

RECIPES |= {
    "compressed-transforms": Recipe(
        _transformed,
        compressed_config(4, 32, transform_config={"config_groups": _TRANSFORMS}),
        ("W4A16",),
        # Modules of one size share a matrix, of which safetensors keep one name.
        extra={
            "model.layers.0.self_attn.o_proj.v_input.weight": _RANDOM.float(),
            "model.layers.1.self_attn.q_proj.w_input.weight": _RANDOM.float().clone(),
        },
    ),
    "modelslim-quarot": Recipe(
        _quarot,
        None,
        ("W8A8_DYNAMIC",),
        {
            "metadata": {
                "quarot": {
                    "max_tp_size": 1,
                    "heads_rotation": {"layers": [f"{i}.self_attn.o_proj" for i in _LAYERS]},
                    "kronecker_rotation": {"layers": [f"{i}.mlp.down_proj" for i in _LAYERS]},
                }
            }
        },
        {
            "model.layers.1.self_attn.o_proj.heads_rotation": (random_hadamard(4) / 2).float(),
            "model.layers.1.mlp.down_proj.kronecker_rotation_m": _M.float(),
            "model.layers.1.mlp.down_proj.kronecker_rotation_n": _N.float(),
        },
    ),
}


#: The float models that checkpoints are made from.
MODELS: dict[str, dict[str, Any]] = {
    "llama": {"architecture": "llama", "head_dim": 64},
    "qwen3_moe": {"architecture": "qwen3_moe", "intermediate": 64},
}


class QuantisedModels:
    """Writes checkpoints by name when they are first asked for."""

    def __init__(self, folder: Path, float_model: Callable[..., str]) -> None:
        self._folder, self._float = folder, float_model
        self._known: dict[tuple[str, str], Written] = {}

    def __call__(self, name: str, model: str = "llama") -> Written:
        if (name, model) not in self._known:
            path = self._float(f"{model}-float", **MODELS[model])
            folder = self._folder / (name if model == "llama" else f"{model}-{name}")
            self._known[name, model] = write(RECIPES[name], path, folder)
        return self._known[name, model]
