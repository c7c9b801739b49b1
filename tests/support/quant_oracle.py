"""What checkpoints of real tools mean, read by code that shares nothing with the plugin's readers.

Every element is computed from its own indices, as the formats are described: nothing is viewed,
permuted or stacked as whole tensors, as the readers do.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from quant_modules import Fake, fake_dynamic, fake_static
from safetensors.torch import load_file

#: Where AWQ puts the output features of a group of eight: nibble i holds feature ``_AWQ[i]``.
_AWQ = (0, 2, 4, 6, 1, 3, 5, 7)


@dataclass(slots=True, eq=False)
class Meant:
    """What a checkpoint means.

    Attributes:
        weights: every float tensor, float64; of quantised modules too, rotations undone.
        fakes: what becomes of the input of a module, by name; nothing where inputs stay float.
        kv_scales: by layer: float32 ``[2, kv_heads, head_dim]``.
    """

    weights: dict[str, torch.Tensor] = field(default_factory=dict)
    fakes: dict[str, Fake] = field(default_factory=dict)
    kv_scales: dict[int, torch.Tensor] = field(default_factory=dict)


def read_meaning(folder: Path) -> Meant:
    """Read a checkpoint of any tool."""
    tensors: dict[str, torch.Tensor] = {}
    for path in sorted(folder.glob("*.safetensors")):
        tensors |= load_file(path)
    config = json.loads((folder / "config.json").read_text())
    about = config.get("quantization_config")
    if (folder / "quant_model_description.json").is_file():
        types = json.loads((folder / "quant_model_description.json").read_text())
        meant = _modelslim(tensors, types)
    elif about["quant_method"] == "compressed-tensors":
        meant = _compressed(tensors, about)
    else:
        meant = _packed(tensors, about)
    heads = config["num_key_value_heads"]
    _kv(meant, tensors, heads, config["head_dim"])
    for name, tensor in tensors.items():
        if name.endswith(("norm.weight", "embed_tokens.weight", "lm_head.weight")):
            meant.weights[name] = tensor.double()
    return meant


#: Indices or words; operators work on each on its own.
Array = np.ndarray


def _nibble(word: Array, i: Array, bits: int = 4) -> Array:
    return (word >> (bits * i)) & ((1 << bits) - 1)


def _fill(n: int, k: int, value: Callable[[Array, Array], Array]) -> torch.Tensor:
    """Return ``value(i, j)`` of every row and column, float64 ``[n, k]``."""
    i, j = np.meshgrid(np.arange(n), np.arange(k), indexing="ij")
    return torch.from_numpy(value(i, j).astype(np.float64))


def _words(tensor: torch.Tensor) -> Array:
    return tensor.to(torch.int64).numpy()


# ---- compressed-tensors ----


def _compressed(tensors: dict[str, torch.Tensor], about: dict[str, Any]) -> Meant:
    meant = Meant()
    (group,) = about["config_groups"].values()
    for name in [name for name in tensors if name.endswith(".weight_scale")]:
        module = name.removesuffix(".weight_scale")
        if f"{module}.weight_packed" in tensors:
            weight = _compressed_packed(tensors, module, group["weights"])
        else:
            codes = tensors[f"{module}.weight"].double()
            weight = codes * tensors[name].double().reshape(len(codes), 1)
        turn = _turn(tensors, about, module)
        meant.weights[f"{module}.weight"] = weight if turn is None else weight @ turn.T
        inputs = group["input_activations"]
        if inputs and group["weights"]["num_bits"] == 8:
            meant.fakes[module] = _compressed_inputs(tensors, module, inputs)
    return meant


def _compressed_packed(
    tensors: dict[str, torch.Tensor], module: str, about: dict[str, Any]
) -> torch.Tensor:
    bits = about["num_bits"]
    per_word, half = 32 // bits, 1 << (bits - 1)
    words = _words(tensors[f"{module}.weight_packed"])
    scales = tensors[f"{module}.weight_scale"].double().numpy()
    zeros = tensors.get(f"{module}.weight_zero_point")
    n, k = tensors[f"{module}.weight_shape"].tolist()
    group = about["group_size"] or k
    zero_words = None if zeros is None or about["symmetric"] else _words(zeros)

    def value(i: Array, j: Array) -> Array:
        code = _nibble(words[i, j // per_word], j % per_word, bits)
        zero = half
        if zero_words is not None:
            zero = _nibble(zero_words[i // per_word, j // group], i % per_word, bits)
        return (code - zero) * scales[i, j // group]

    return _fill(n, k, value)


def _compressed_inputs(
    tensors: dict[str, torch.Tensor], module: str, inputs: dict[str, Any]
) -> Fake:
    if inputs["dynamic"]:
        return fake_dynamic(inputs["symmetric"])
    zero = 0
    if not inputs["symmetric"]:
        zero = int(tensors[f"{module}.input_zero_point"])
    return fake_static(float(tensors[f"{module}.input_scale"]), zero)


def _turn(
    tensors: dict[str, torch.Tensor], about: dict[str, Any], module: str
) -> torch.Tensor | None:
    """Return what the input of a module is multiplied with while serving, ``[k, k]``.

    Modules of one size share a matrix, which lies beside one of them, without its factor; with a
    ``head_dim``, all do, and every so many columns are multiplied with it.
    """
    for name, scheme in ((about.get("transform_config") or {}).get("config_groups") or {}).items():
        runs = any(
            apply["location"] == "input" and _targets(apply, module) for apply in scheme["apply"]
        )
        if not runs:
            continue
        k = tensors[f"{module}.weight_shape"].tolist()[1]
        size = scheme.get("head_dim") or k
        stored = [
            tensor.double()
            for key, tensor in tensors.items()
            if key.endswith(f".{name}_input.weight") and len(tensor) == size
        ]
        return torch.block_diag(*[stored[0] / stored[0][0].norm()] * (k // size))
    return None


def _targets(apply: dict[str, Any], module: str) -> bool:
    import re

    def matches(targets: list[str]) -> bool:
        return any(
            target == "Linear" or re.match(target.removeprefix("re:"), module) for target in targets
        )

    return matches(apply["targets"]) and not matches(apply["ignore"])


# ---- ModelSlim ----


def _modelslim(tensors: dict[str, torch.Tensor], types: dict[str, str]) -> Meant:
    meant = Meant()
    for name, kind in types.items():
        module = name.removesuffix(".weight")
        if not name.endswith(".weight") or kind == "FLOAT":
            continue
        codes = tensors[name].double()
        if kind == "W8A8":
            deq = tensors[f"{module}.deq_scale"]
            deq = deq.to(torch.int32).view(torch.float32) if deq.dtype == torch.int64 else deq
            scale = float(tensors[f"{module}.input_scale"])
            offset = int(tensors[f"{module}.input_offset"])
            correction = -codes.sum(1) * offset
            assert torch.equal(tensors[f"{module}.quant_bias"].double(), correction)
            meant.weights[name] = codes * (deq.double() / scale)[:, None]
            meant.fakes[module] = fake_static(scale, offset)
            continue
        if kind.startswith("W4"):
            codes = _modelslim_nibbles(tensors[name])
        scales = tensors[f"{module}.weight_scale"].double()
        offsets = tensors[f"{module}.weight_offset"].double()
        group = codes.shape[1] // scales.shape[1]
        scales, offsets = (part.repeat_interleave(group, 1) for part in (scales, offsets))
        meant.weights[name] = (codes - offsets) * scales
        if kind == "W8A8_DYNAMIC":
            meant.fakes[module] = fake_dynamic()
    return meant


def _modelslim_nibbles(packed: torch.Tensor) -> torch.Tensor:
    rows = _words(packed)

    def value(i: Array, j: Array) -> Array:
        code = _nibble(rows[i // 2, j] & 255, i % 2)
        return np.where(code > 7, code - 16, code)

    return _fill(2 * packed.shape[0], packed.shape[1], value)


# ---- GPTQ and AWQ ----


def _packed(tensors: dict[str, torch.Tensor], about: dict[str, Any]) -> Meant:
    meant = Meant()
    is_awq = about["quant_method"] == "awq" or "awq" in about.get("packing_format", "")
    second = about.get("checkpoint_format") == "gptq_v2"
    for name in [name for name in tensors if name.endswith(".qweight")]:
        module = name.removesuffix(".qweight")
        parts = [tensors[f"{module}.{part}"] for part in ("qweight", "qzeros", "scales")]
        if is_awq:
            meant.weights[f"{module}.weight"] = _awq(*parts, about["group_size"])
        else:
            index = tensors.get(f"{module}.g_idx")
            meant.weights[f"{module}.weight"] = _gptq(
                *parts, index, about["group_size"], 0 if second else 1
            )
    return meant


def _gptq(
    packed: torch.Tensor,
    zeros: torch.Tensor,
    scales: torch.Tensor,
    index: torch.Tensor | None,
    group: int,
    lacking: int,
) -> torch.Tensor:
    words, zero_words, steps = _words(packed), _words(zeros), scales.double().numpy()
    k, n = packed.shape[0] * 8, packed.shape[1]
    groups = np.arange(k) // group if index is None else _words(index)

    def value(i: Array, j: Array) -> Array:
        code = _nibble(words[j // 8, i], j % 8)
        zero = _nibble(zero_words[groups[j], i // 8], i % 8) + lacking
        return (code - zero) * steps[groups[j], i]

    return _fill(n, k, value)


def _awq(
    packed: torch.Tensor, zeros: torch.Tensor, scales: torch.Tensor, group: int
) -> torch.Tensor:
    words, zero_words, steps = _words(packed), _words(zeros), scales.double().numpy()
    k, n = packed.shape[0], packed.shape[1] * 8
    place_of = np.array([_AWQ.index(feature) for feature in range(8)])

    def value(i: Array, j: Array) -> Array:
        place = place_of[i % 8]
        code = _nibble(words[j, i // 8], place)
        zero = _nibble(zero_words[j // group, i // 8], place)
        return (code - zero) * steps[j // group, i]

    return _fill(n, k, value)


# ---- KV caches ----


def _kv(meant: Meant, tensors: dict[str, torch.Tensor], heads: int, dim: int) -> None:
    for layer in range(100):
        prefix = f"model.layers.{layer}.self_attn"
        sides = []
        for side in "kv":
            stored = tensors.get(f"{prefix}.{side}_proj.kv_cache_scale")
            if stored is None:
                stored = tensors.get(f"{prefix}.{side}_scale")
            if stored is None:
                return
            flat = stored.float().flatten()
            if flat.numel() < heads * dim:
                flat = flat.reshape(-1, 1).expand(-1, heads * dim // flat.numel()).flatten()
            sides.append(flat.reshape(heads, dim))
        meant.kv_scales[layer] = torch.stack(sides)
