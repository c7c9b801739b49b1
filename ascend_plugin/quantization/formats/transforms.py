"""Rotations of compressed-tensors: which ones must be computed while serving."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ascend_plugin.quantization.errors import (
    DOWNLOAD_AGAIN,
    CheckpointError,
    unknown_value,
    wrong_tensor,
)
from ascend_plugin.quantization.scheme import ModuleScheme, Rotation
from ascend_plugin.quantization.tensors import TensorIndex

_KINDS = ("hadamard", "random-hadamard", "random-matrix")
_LOCATIONS = ("input", "weight_input", "weight_output", "output", "k_cache", "q_attn")

_Found = tuple[dict[str, tuple[Rotation, ...]], tuple[str, ...]]


def rotation_tensors(config: Mapping[str, Any], index: TensorIndex) -> frozenset[str]:
    """Return the names of the tensors that hold matrices of rotations.

    Args:
        config: ``quantization_config``.
        index: tensors of the checkpoint.
    """
    names = "|".join(re.escape(name) for name in _schemes(config))
    pattern = re.compile(rf".*\.(?:{names})_(?:input|output)\.(?:weight|perm)")
    return frozenset(name for name in index if names and pattern.fullmatch(name))


def _schemes(config: Mapping[str, Any]) -> Mapping[str, Any]:
    found: Mapping[str, Any] = (config.get("transform_config") or {}).get("config_groups") or {}
    return found


def find_rotations(
    path: Path,
    config: Mapping[str, Any],
    index: TensorIndex,
    modules: Mapping[str, ModuleScheme],
) -> _Found:
    """Return the rotations of every module at run time.

    Args:
        path: of ``config.json``.
        config: its ``quantization_config``.
        index: tensors of the checkpoint.
        modules: its modules with a weight matrix.

    Returns:
        Rotations by module, and remarks.

    Raises:
        CheckpointError: a transform is unknown, cannot be served, or its matrix is missing.
    """
    found: dict[str, tuple[Rotation, ...]] = {}
    notes: list[str] = []
    for name, scheme in _schemes(config).items():
        where = f"{path}: quantization_config.transform_config.config_groups.{name}"
        kind = scheme.get("type")
        if kind not in _KINDS:
            raise unknown_value(f"{where}.type", kind, _KINDS, DOWNLOAD_AGAIN)
        for arguments in scheme.get("apply") or ():
            location = arguments.get("location")
            if location not in _LOCATIONS:
                raise unknown_value(f"{where}.apply.location", location, _LOCATIONS, DOWNLOAD_AGAIN)
            if location in ("k_cache", "q_attn"):
                _refuse_static_kv(where, config)
                notes.append(
                    f"{name}: left out: it rotates queries and keys alike, which changes no product"
                )
            if location not in ("input", "output"):
                continue  # part of the weights already
            for module in _targets(arguments, modules):
                rotation = _rotation(where, index, name, scheme, arguments, modules[module])
                found[module] = (*found.get(module, ()), rotation)
    return found, tuple(dict.fromkeys(notes))


def _refuse_static_kv(where: str, config: Mapping[str, Any]) -> None:
    if config.get("kv_cache_scheme"):
        raise CheckpointError(
            f"{where} rotates keys before they are cached, and kv_cache_scheme has static scales "
            "for rotated keys; expected one of them alone. Quantise the model without the rotation "
            "of keys (R3), or without kv_cache_scheme: int8 pages of the variant c8d rotate keys "
            "themselves."
        )


def _targets(arguments: Mapping[str, Any], modules: Mapping[str, ModuleScheme]) -> list[str]:
    from compressed_tensors.utils.match import match_name

    def listed(key: str) -> list[str]:
        value = arguments.get(key) or []
        return [value] if isinstance(value, str) else list(value)

    def matches(module: str, targets: list[str]) -> bool:
        linear = "Linear" in targets and "embed" not in module.rpartition(".")[2]
        return linear or any(match_name(module, target) for target in targets)

    targets, ignored = listed("targets"), listed("ignore")
    return [name for name in modules if matches(name, targets) and not matches(name, ignored)]


def _rotation(
    where: str,
    index: TensorIndex,
    name: str,
    scheme: Mapping[str, Any],
    arguments: Mapping[str, Any],
    module: ModuleScheme,
) -> Rotation:
    location = arguments["location"]
    if module.name.rpartition(".")[2].startswith("embed"):
        raise CheckpointError(
            f"{where} rotates the {location} of {module.name} at run time; expected linear "
            "modules. Fuse the rotation into the embedding (location weight_output)."
        )
    features = module.k if location == "input" else module.n
    block = int(scheme.get("head_dim") or features)
    if features % block:
        raise CheckpointError(
            f"{where}.head_dim is {block}, which does not divide the {features} {location} "
            f"features of {module.name}; expected a divisor. {DOWNLOAD_AGAIN}"
        )
    inverse = bool(arguments.get("inverse", False))
    if scheme["type"] == "hadamard" and not scheme.get("randomize") and not block & (block - 1):
        return Rotation(name, location, "hadamard", block, inverse)
    matrix = _matrix(where, index, name, location, module, block)
    return Rotation(name, location, "matrix", block, inverse, (matrix,))


def _matrix(
    where: str, index: TensorIndex, name: str, location: str, module: ModuleScheme, block: int
) -> str:
    """Return the tensor with a rotation's matrix, which modules of one size share."""
    own = f"{module.name}.{name}_{location}.weight"
    if own in index:
        if index[own].shape != (block, block):
            raise wrong_tensor(index[own], f"[{block}, {block}]", f"{where} says so")
        return own
    ending = re.compile(rf".*\.{re.escape(name)}_(input|output)\.weight")
    for tensor, info in index.items():
        if ending.fullmatch(tensor) and info.shape == (block, block):
            return tensor
    raise CheckpointError(
        f"{index.folder}: tensor {own} is missing; expected because {where} rotates the {location} "
        f"of {module.name} with a matrix [{block}, {block}]. {DOWNLOAD_AGAIN}"
    )
