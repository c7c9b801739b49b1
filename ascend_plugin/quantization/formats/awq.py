"""AWQ checkpoints of AutoAWQ, llm-awq and auto-round, packed for GEMM."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ascend_plugin.quantization.check import check_group, check_module
from ascend_plugin.quantization.errors import unknown_value, wrong_tensor
from ascend_plugin.quantization.scheme import Checkpoint, Layout, ModuleScheme, Scheme, Source
from ascend_plugin.quantization.tensors import TensorIndex

from .auto_round import is_auto_round, packing
from .common import float_modules, module_tensors
from .gptq import no_codes, refuse_bin_files, settings

_ROLES = ("qweight", "qzeros", "scales", "bias")


def claims(config: Mapping[str, Any]) -> bool:
    """Say whether a ``quantization_config`` is AWQ."""
    if is_auto_round(config):
        return "awq" in packing(config)
    return config.get("quant_method") == "awq"


def parse(index: TensorIndex, config: Mapping[str, Any]) -> Checkpoint:
    """Describe an AWQ checkpoint.

    Args:
        index: its tensors.
        config: ``quantization_config`` of its ``config.json``.

    Raises:
        CheckpointError: the configuration is unknown or does not fit the tensors.
    """
    path = index.folder / "config.json"
    version = str(config.get("version") or "gemm").lower()
    if version != "gemm":
        raise unknown_value(
            f"{path}: quantization_config.version",
            version,
            ("gemm",),
            "Quantise the model with version='gemm'.",
        )
    refuse_bin_files(index)
    modules: dict[str, ModuleScheme] = {}
    for name, roles in module_tensors(index, _ROLES).items():
        if "qweight" in roles or "qzeros" in roles or "scales" in roles:
            modules[name] = _module(path, index, config, name)
    if not modules:
        raise no_codes(path, index)
    modules |= float_modules(index, modules, lambda _: "not quantised")
    return Checkpoint(index.folder, Source.AWQ, modules, index)


def _module(path: Path, index: TensorIndex, config: Mapping[str, Any], name: str) -> ModuleScheme:
    why = f"{path.name} says that {name} is AWQ"
    tensors = {role: index.need(f"{name}.{role}", why) for role in ("qweight", "scales")}
    if config.get("zero_point", True):
        tensors["qzeros"] = index.need(f"{name}.qzeros", why)
    for role in ("qzeros", "bias"):
        if f"{name}.{role}" in index:
            tensors[role] = index[f"{name}.{role}"]
    about = settings(path, config, name)
    if about.bits != 4:
        raise unknown_value(
            f"{path}: quantization_config.bits of {name}",
            about.bits,
            ("4",),
            "Quantise the model with 4 bits.",
        )
    codes = tensors["qweight"]
    if len(codes.shape) != 2 or codes.dtype != "I32":
        raise wrong_tensor(codes, "I32 [input features, output features / 8]", why)
    k, n = codes.shape[0], codes.shape[1] * 8
    group = k if about.group == -1 else about.group
    check_group(name, codes, k, group, f"group_size in {path.name}")
    found = ModuleScheme(
        name=name,
        scheme=Scheme.W4A16,
        source=Source.AWQ,
        source_type=packing(config) if is_auto_round(config) else "gemm",
        layout=Layout.AWQ,
        bits=4,
        n=n,
        k=k,
        group=group,
        symmetric="qzeros" not in tensors,
        tensors=tensors,
    )
    check_module(found)
    return found
