"""GPTQ checkpoints of gptqmodel, AutoGPTQ and auto-round."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from ascend_plugin.quantization.check import check_group, check_module
from ascend_plugin.quantization.errors import (
    DOWNLOAD_AGAIN,
    CheckpointError,
    contradiction,
    unknown_value,
    wrong_tensor,
)
from ascend_plugin.quantization.scheme import Checkpoint, Layout, ModuleScheme, Scheme, Source
from ascend_plugin.quantization.tensors import TensorIndex

from .auto_round import (
    is_auto_round,
    layer_override,
    packing,
)
from .common import float_modules, module_tensors

_ROLES = ("qweight", "qzeros", "scales", "g_idx", "bias")
_NEEDED = ("qweight", "qzeros", "scales")

_REMEDY = "Quantise the model with one of these, or serve it with vLLM's own quantisation."


@dataclass(frozen=True, slots=True)
class Settings:
    """What a configuration says of one module; None: nothing."""

    bits: int
    group: int
    symmetric: bool


def claims(config: Mapping[str, Any]) -> bool:
    """Say whether a ``quantization_config`` is GPTQ with 4 or 8 bits."""
    if is_auto_round(config):
        return "gptq" in packing(config)
    # gptqmodel also writes other methods under this name.
    return config.get("quant_method") == "gptq" and config.get("checkpoint_format") in (
        None,
        "gptq",
        "gptq_v2",
    )


def parse(index: TensorIndex, config: Mapping[str, Any]) -> Checkpoint:
    """Describe a GPTQ checkpoint.

    Args:
        index: its tensors.
        config: ``quantization_config`` of its ``config.json``.

    Raises:
        CheckpointError: the configuration is unknown or does not fit the tensors.
    """
    path = index.folder / "config.json"
    refuse_bin_files(index)
    modules: dict[str, ModuleScheme] = {}
    for name, roles in module_tensors(index, _ROLES).items():
        if "qweight" in roles or "qzeros" in roles or "scales" in roles:
            modules[name] = _module(path, index, config, name)
    if not modules:
        raise no_codes(path, index)

    def reason(module: str) -> str:
        return "excluded by the recipe" if _override(config, module) is False else "not quantised"

    modules |= float_modules(index, modules, reason)
    return Checkpoint(index.folder, Source.GPTQ, modules, index)


def refuse_bin_files(index: TensorIndex) -> None:
    """Refuse folders where the safetensors files are only a part.

    Raises:
        CheckpointError: there are ``*.bin`` weights beside.
    """
    others = sorted(index.folder.glob("pytorch_model*.bin"))
    if others:
        raise CheckpointError(
            f"{others[0]}: weights beside safetensors; expected safetensors alone. Convert or "
            "remove them."
        )


def no_codes(path: Path, index: TensorIndex) -> CheckpointError:
    """Return the error for a checkpoint that has not one quantised module."""
    return contradiction(
        str(path),
        "it says that the checkpoint is quantised",
        f"no file of {index.folder} has a tensor '….qweight'",
        DOWNLOAD_AGAIN,
    )


def settings(path: Path, config: Mapping[str, Any], module: str) -> Settings:
    """Return what a configuration says of one module.

    Raises:
        CheckpointError: unknown values, or a module that it excludes.
    """
    override = _override(config, module)
    if override is False:
        raise contradiction(
            f"{path}: {module}",
            "it is excluded from quantisation",
            f"there is a tensor {module}.qweight",
            DOWNLOAD_AGAIN,
        )
    merged = {**config, **(override or {})}
    bits = merged.get("bits", merged.get("w_bit"))
    if bits not in (4, 8):
        raise unknown_value(
            f"{path}: quantization_config.bits of {module}", bits, ("4", "8"), _REMEDY
        )
    group = merged.get("group_size", merged.get("q_group_size", -1))
    if not isinstance(group, int) or (group < 1 and group != -1):
        raise unknown_value(
            f"{path}: quantization_config.group_size of {module}",
            group,
            ("-1", "a positive number"),
            _REMEDY,
        )
    return Settings(bits, group, bool(merged.get("sym", True)))


def _override(config: Mapping[str, Any], module: str) -> Mapping[str, Any] | Literal[False] | None:
    """Return what is said of one module alone; False: it is excluded; None: nothing."""
    if is_auto_round(config):
        return layer_override(config, module)
    for pattern, values in (config.get("dynamic") or {}).items():
        if pattern.startswith("-:"):
            if re.match(pattern.removeprefix("-:"), module):
                return False
        elif re.match(pattern.removeprefix("+:"), module):
            return dict(values or {})
    return None


def _module(path: Path, index: TensorIndex, config: Mapping[str, Any], name: str) -> ModuleScheme:
    why = f"{path.name} says that {name} is GPTQ"
    tensors = {role: index.need(f"{name}.{role}", why) for role in _NEEDED}
    for role in ("g_idx", "bias"):
        if f"{name}.{role}" in index:
            tensors[role] = index[f"{name}.{role}"]
    about = settings(path, config, name)
    codes = tensors["qweight"]
    if len(codes.shape) != 2 or codes.dtype != "I32":
        raise wrong_tensor(codes, "I32 [input features * bits / 32, output features]", why)
    k, n = codes.shape[0] * 32 // about.bits, codes.shape[1]
    group = k if about.group == -1 else about.group
    check_group(name, codes, k, group, f"group_size in {path.name}")
    version = str(config.get("checkpoint_format") or "gptq")
    found = ModuleScheme(
        name=name,
        scheme=Scheme.W4A16 if about.bits == 4 else Scheme.W8A16,
        source=Source.GPTQ,
        source_type=packing(config) if is_auto_round(config) else version,
        layout=Layout.GPTQ,
        bits=about.bits,
        n=n,
        k=k,
        group=group,
        symmetric=about.symmetric,
        tensors=tensors,
        zero_shift=0 if version == "gptq_v2" else 1,
        activation_order=bool(config.get("desc_act")) and "g_idx" in tensors and group != k,
    )
    check_module(found)
    return found
