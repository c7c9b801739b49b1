"""ModelSlim: ``quant_model_description.json`` says the type of every tensor.

Read in msmodelslim 26.1.0: ``core/quant_service/modelslim_v1/save/ascendv1.py`` (format 1) and
``pytorch/llm_ptq/llm_ptq_tools/save/complex_quantifier.py`` (its predecessor, with W4A16).
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ascend_plugin.quantization.check import check_module
from ascend_plugin.quantization.errors import (
    DOWNLOAD_AGAIN,
    CheckpointError,
    contradiction,
    unknown_value,
    wrong_tensor,
)
from ascend_plugin.quantization.scheme import (
    Checkpoint,
    InputScheme,
    KVScheme,
    Layout,
    ModuleScheme,
    Rotation,
    Scheme,
    Source,
)
from ascend_plugin.quantization.tensors import FLOAT_TYPES, TensorIndex, TensorInfo

from .common import float_modules

DESCRIPTION_FILE = "quant_model_description.json"


@dataclass(frozen=True, slots=True)
class _Type:
    """What a type of the description stands for."""

    scheme: Scheme
    bits: int
    roles: tuple[str, ...]
    input: InputScheme | None = None


_STATIC = ("weight", "input_scale", "input_offset", "deq_scale", "quant_bias")
_SCALED = ("weight", "weight_scale", "weight_offset")

#: Types of linear modules, with the tensors that each must have.
_TYPES = {
    "W8A8": _Type(Scheme.W8A8, 8, _STATIC, InputScheme(dynamic=False, symmetric=False)),
    "W8A8_DYNAMIC": _Type(Scheme.W8A8_DYNAMIC, 8, _SCALED, InputScheme(True, True)),
    "W8A8_MIX": _Type(Scheme.W8A8_DYNAMIC, 8, (*_STATIC, *_SCALED[1:]), InputScheme(True, True)),
    "W8A16": _Type(Scheme.W8A16, 8, _SCALED),
    "W4A16": _Type(Scheme.W4A16, 4, _SCALED),
    "W4A8_DYNAMIC": _Type(Scheme.W4A8, 4, _SCALED, InputScheme(True, True)),
    "W4A8": _Type(Scheme.W4A8, 4, _SCALED, InputScheme(True, True)),
}

#: Every tensor that may belong to a module.
_ROLES = (
    *dict.fromkeys((*_STATIC, *_SCALED)),
    "bias",
    "weight_scale_second",
    "weight_offset_second",
    "scale_bias",
)

#: Types that are not of linear modules.
_OTHER_TYPES = ("FLOAT", "C8", "FAQuant")

#: Keys of the description that are not tensors.
_GLOBALS = re.compile(
    r"version|model_quant_type|metadata|group_size|optional|kv_cache_type|kv_quant_type|"
    r"fa_quant_type|indexer_quant_type|is_rot_used|reduce_quant_type|.*\.quant_type"
)

_KV = re.compile(r"(.*)\.[kv]_proj\.kv_cache_(scale|offset)")
_ROTATIONS = {"heads_rotation": ("heads_rotation",)} | {
    "kronecker_rotation": ("kronecker_rotation_m", "kronecker_rotation_n")
}
_ROTATION_NAMES = tuple(name for names in _ROTATIONS.values() for name in names)


def parse(folder: Path, index: TensorIndex) -> Checkpoint:
    """Describe a ModelSlim checkpoint.

    Args:
        folder: of the checkpoint.
        index: its tensors.

    Raises:
        CheckpointError: the description is unreadable, unknown or does not fit the tensors.
    """
    path = folder / DESCRIPTION_FILE
    description = _read(path)
    types = _tensor_types(path, description, index)
    modules: dict[str, ModuleScheme] = {}
    for name, kind in types.items():
        module, _, role = name.rpartition(".")
        if role == "weight" and kind in _TYPES:
            modules[module] = _module(path, description, index, module, kind)
    _refuse_strays(path, types, modules, index)
    modules |= _checked_floats(path, types, index, modules)
    rotations, unused = _rotations(path, description, index, modules)
    for name, rotation in rotations.items():
        modules[name] = replace(modules[name], rotations=(rotation,))
    return Checkpoint(
        folder=folder,
        source=Source.MODELSLIM,
        modules=modules,
        index=index,
        kv=_kv(index),
        notes=_notes(description),
        unused=unused,
    )


def _read(path: Path) -> Mapping[str, Any]:
    try:
        description = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"{path}: expected a JSON object with the type of every tensor ({error}). "
            f"{DOWNLOAD_AGAIN}"
        ) from error
    if not isinstance(description, Mapping):
        raise CheckpointError(
            f"{path}: expected a JSON object with the type of every tensor, got "
            f"{type(description).__name__}. {DOWNLOAD_AGAIN}"
        )
    return description


def _tensor_types(path: Path, description: Mapping[str, Any], index: TensorIndex) -> dict[str, str]:
    """Return the type of every tensor that the description lists; each is known and exists."""
    types = {}
    allowed = (*_TYPES, *_OTHER_TYPES)
    for name, kind in description.items():
        if _GLOBALS.fullmatch(name):
            continue
        if kind not in allowed:
            raise unknown_value(
                f"{path}: the type of tensor {name}",
                kind,
                allowed,
                "Quantise the model with one of these types, or use a newer plugin.",
            )
        index.need(name, f"{path.name} says that it is {kind}")
        types[name] = kind
    return types


def _module(
    path: Path, description: Mapping[str, Any], index: TensorIndex, module: str, kind: str
) -> ModuleScheme:
    about = _TYPES[kind]
    why = f"{path.name} says that {module} is {kind}"
    tensors = {role: index.need(f"{module}.{role}", why) for role in about.roles}
    for role in _ROLES:
        if f"{module}.{role}" in index:
            tensors[role] = index[f"{module}.{role}"]
    _same_type(path, description, module, kind, tensors)
    n, k, layout = _size(about, description, tensors, why)
    if "weight_scale_second" in tensors:
        scale = tensors["weight_scale_second"]
    else:
        scale = tensors.get("weight_scale", tensors["weight"])
    groups = scale.shape[1] if about.scheme is not Scheme.W8A8 and len(scale.shape) == 2 else 1
    group = k // max(groups, 1)
    said = int(description.get("group_size") or 0)
    if groups > 1 and said and said != group:
        raise contradiction(
            f"{scale.file}: tensor {scale.name}",
            f"{path.name} says group_size {said}",
            f"its shape {list(scale.shape)} makes {groups} groups of {k} input features ({group})",
            DOWNLOAD_AGAIN,
        )
    found = ModuleScheme(
        name=module,
        scheme=about.scheme,
        source=Source.MODELSLIM,
        source_type=kind,
        layout=layout,
        bits=about.bits,
        n=n,
        k=k,
        group=group,
        # Offsets may be zero: known when they are read.
        symmetric=about.scheme in (Scheme.W8A8, Scheme.W8A8_DYNAMIC, Scheme.W4A8),
        tensors=tensors,
        input=about.input,
    )
    check_module(found)
    return found


def _size(
    about: _Type, description: Mapping[str, Any], tensors: Mapping[str, TensorInfo], why: str
) -> tuple[int, int, Layout]:
    """Return output and input features, and how the codes are packed."""
    weight = tensors["weight"]
    if len(weight.shape) != 2 or weight.dtype != "I8":
        raise wrong_tensor(weight, "I8 [output features, input features]", why)
    rows, columns = weight.shape
    if about.bits == 8:
        return rows, columns, Layout.INT8
    n = tensors["weight_scale"].shape[0] if tensors["weight_scale"].shape else 0
    if rows * 2 == n:
        return n, columns, Layout.NIBBLES_OUT
    if rows != n:
        raise wrong_tensor(
            weight,
            f"I8 [{n}, input features] or, packed, [{n // 2}, input features]",
            f"{why}, and {tensors['weight_scale'].name} has {n} rows",
        )
    # Files with a version pack one scale per channel along the input; older ones do not pack.
    per_channel = tensors["weight_scale"].shape[1:] in ((), (1,))
    if per_channel and "version" in description:
        return n, columns * 2, Layout.NIBBLES_IN
    return n, columns, Layout.INT8


def _same_type(
    path: Path,
    description: Mapping[str, Any],
    module: str,
    kind: str,
    tensors: Mapping[str, TensorInfo],
) -> None:
    """Refuse a module whose tensors are said to be of several types."""
    for role in tensors:
        said = description.get(f"{module}.{role}", kind)
        if said != kind and not (role == "bias" and said == "FLOAT"):
            raise contradiction(
                f"{path}: tensor {module}.{role}",
                f"{module}.weight is {kind}",
                f"{module}.{role} is {said}",
                "All tensors of a module have one type. " + DOWNLOAD_AGAIN,
            )


def _refuse_strays(
    path: Path, types: Mapping[str, str], modules: Mapping[str, ModuleScheme], index: TensorIndex
) -> None:
    """Refuse tensors of a quantised type whose module has no weight of it, and biases of norms."""
    for name, kind in types.items():
        module, _, role = name.rpartition(".")
        if kind in _TYPES and module not in modules:
            raise contradiction(
                f"{path}: tensor {name}",
                f"it is {kind}",
                f"{module}.weight is {types.get(f'{module}.weight', 'not listed')}",
                DOWNLOAD_AGAIN,
            )
        if role == "bias" and module.endswith("norm") and f"{module}.weight" in index:
            raise CheckpointError(
                f"{index[name].file}: tensor {name} is a bias of a norm, which models of vLLM do "
                "not have; expected none. Quantise the model without the anti-outlier method that "
                "adds it (m1 to m3; m4 and later do not)."
            )


def _checked_floats(
    path: Path, types: Mapping[str, str], index: TensorIndex, modules: Mapping[str, ModuleScheme]
) -> dict[str, ModuleScheme]:
    for name, kind in types.items():
        info = index[name]
        if kind == "FLOAT" and name.endswith(".weight") and info.dtype not in FLOAT_TYPES:
            raise wrong_tensor(info, "/".join(FLOAT_TYPES), f"{path.name} says that it is FLOAT")
    for name, info in index.items():
        if name.endswith(".weight") and name not in types and info.dtype not in FLOAT_TYPES:
            raise contradiction(
                f"{path}: tensor {name}",
                f"{info.file.name} holds it as {info.dtype}",
                f"{path.name} does not list it",
                DOWNLOAD_AGAIN,
            )

    def reason(module: str) -> str:
        listed = types.get(f"{module}.weight") == "FLOAT"
        return "described as FLOAT" if listed else "not described"

    return float_modules(index, modules, reason)


def _kv(index: TensorIndex) -> KVScheme | None:
    layers = {match[1] for name in index if (match := _KV.fullmatch(name)) and match[2] == "scale"}
    return KVScheme("C8", len(layers), Source.MODELSLIM) if layers else None


def _rotations(
    path: Path,
    description: Mapping[str, Any],
    index: TensorIndex,
    modules: Mapping[str, ModuleScheme],
) -> tuple[dict[str, Rotation], frozenset[str]]:
    """Return QuaRot's rotations at run time by module, and the tensors that hold them."""
    about = (description.get("metadata") or {}).get("quarot") or {}
    stored = [name for name in index if name.rpartition(".")[2] in _ROTATION_NAMES]
    found: dict[str, Rotation] = {}
    for kind, roles in _ROTATIONS.items():
        for layer in (about.get(kind) or {}).get("layers", ()):
            names = [_rotation_tensor(path, stored, layer, role) for role in roles]
            if layer not in modules:
                raise contradiction(
                    f"{path}: metadata.quarot.{kind}",
                    f"it rotates the input of {layer}",
                    "there is no such module",
                    DOWNLOAD_AGAIN,
                )
            sizes = [index[name].shape[0] for name in names]
            inner = _head_dim(path.parent) if kind == "heads_rotation" else sizes[1]
            block = sizes[0] * inner
            if modules[layer].k % block:
                raise wrong_tensor(
                    index[names[0]],
                    f"sizes that make a divisor of {modules[layer].k}",
                    f"it rotates the input of {layer}, {modules[layer].k} features",
                )
            short = kind.removesuffix("_rotation")
            found[layer] = Rotation(kind, "input", short, block, tensors=tuple(names))
    return found, frozenset(stored)


def _rotation_tensor(path: Path, stored: list[str], layer: str, role: str) -> str:
    own = f"{layer}.{role}"
    if own in stored:
        return own
    shared = [name for name in stored if name.endswith(f".{role}") or name == role]
    if not shared:
        raise CheckpointError(
            f"{path}: metadata.quarot rotates {layer}, but tensor {role} is missing in the "
            f"checkpoint; expected one for {layer} or one for all. {DOWNLOAD_AGAIN}"
        )
    return shared[0]


def _head_dim(folder: Path) -> int:
    """Return the size of an attention head: what the rotation of heads leaves as it is."""
    path = folder / "config.json"
    try:
        config = json.loads(path.read_text())
        return int(config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"])
    except (OSError, ValueError, KeyError) as error:
        raise CheckpointError(
            f"{path}: expected hidden_size and num_attention_heads ({error!r}). {DOWNLOAD_AGAIN}"
        ) from error


def _notes(description: Mapping[str, Any]) -> tuple[str, ...]:
    notes = []
    if ((description.get("optional") or {}).get("quarot") or {}).get("rotation_map"):
        notes.append("QuaRot: the weights are rotated already; nothing is rotated for it here")
    if any(kind == "W8A8_MIX" for kind in description.values()):
        notes.append("W8A8_MIX: inputs are quantised per token, in prefill and in decode")
    if description.get("fa_quant_type"):
        notes.append("FAQuant: attention runs unquantised")
    return tuple(notes)
