"""From one format of quantised checkpoints to another: the same codes, scales and zero points."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from ascend_plugin.kv_cache.checkpoint import is_int8_scheme, is_kv_scale, read_checkpoint_scales
from ascend_plugin.quantization.formats import describe, read_quantization_config
from ascend_plugin.quantization.scheme import Checkpoint, ModuleScheme
from ascend_plugin.weight_tools import compressed_writer, modelslim_writer
from ascend_plugin.weight_tools.environments import Progress
from ascend_plugin.weight_tools.errors import WeightToolError
from ascend_plugin.weight_tools.portable import PortableModule, read_module
from ascend_plugin.weight_tools.shards import ShardWriter

FORMATS = (compressed_writer.FORM, modelslim_writer.FORM)

#: What belongs to a format, and is not copied into another.
_OF_A_FORMAT = ("config.json", "quant_model_description.json", "recipe.yaml")
_COPIED = (".json", ".jinja", ".txt", ".model", ".py")


def convert_checkpoint(source: Path, output: Path, form: str, report: Progress) -> int:
    """Write a quantised checkpoint in another format.

    Args:
        source: its folder.
        output: a folder that does not exist yet.
        form: one of ``FORMATS``.
        report: told of each module.

    Returns:
        Quantised modules.

    Raises:
        WeightToolError: the format cannot say what the checkpoint says.
        CheckpointError: the checkpoint is not what it says.
    """
    checkpoint = _check(source, output, form)
    staged = output.absolute().with_name(f".{output.name}.partial")
    shutil.rmtree(staged, ignore_errors=True)
    staged.mkdir(parents=True)
    try:
        count = _write(checkpoint, staged, form, report)
        for path in sorted(source.iterdir()):
            wanted = path.suffix in _COPIED and path.name not in _OF_A_FORMAT
            if wanted and path.is_file() and not path.name.endswith(".index.json"):
                shutil.copyfile(path, staged / path.name)
        staged.rename(output)
    finally:
        shutil.rmtree(staged, ignore_errors=True)
    return count


def _check(source: Path, output: Path, form: str) -> Checkpoint:
    if form not in FORMATS:
        raise WeightToolError(f"--format {form} is unknown; use one of {', '.join(FORMATS)}.")
    if output.exists():
        raise WeightToolError(f"-o {output} exists; name another folder, or remove it.")
    if not (source / "config.json").is_file():
        raise WeightToolError(f"{source} is no checkpoint: it has no config.json.")
    checkpoint = describe(source)
    if checkpoint is None:
        raise WeightToolError(
            f"{source} is not quantised in a way that is read here; convert needs a checkpoint of "
            "integers. 'ascend-plugin quantize' makes one."
        )
    for module in checkpoint.modules.values():
        if module.rotations:
            raise WeightToolError(
                f"{module.name} has a rotation at run time ({module.rotations[0].name}), which is "
                "not converted. Quantise the model with rotations that are multiplied into the "
                "weights (SpinQuant's R1 and R2)."
            )
    return checkpoint


def _write(checkpoint: Checkpoint, folder: Path, form: str, report: Progress) -> int:
    config = json.loads((checkpoint.folder / "config.json").read_text())
    dtype = getattr(torch, str(config.get("dtype") or config.get("torch_dtype") or "bfloat16"))
    writer = _Modelslim(folder, dtype) if form == modelslim_writer.FORM else _Compressed(folder)
    quantised = [module for module in checkpoint.modules.values() if module.quantised]
    taken = {info.name for module in quantised for info in module.tensors.values()}
    for i, about in enumerate(quantised):
        report(about.name, i, len(quantised))
        writer.module(read_module(checkpoint, about))
    int8_scheme = is_int8_scheme(read_quantization_config(checkpoint.folder))
    for name in checkpoint.index:
        if name not in taken and not is_kv_scale(name, int8_scheme):
            writer.float_tensor(name, checkpoint.index.read(name))
    for name, scale in _kv_scales(checkpoint, config, int8_scheme).items():
        writer.kv_scale(name, scale)
    config.pop("quantization_config", None)
    floats = [m for m in checkpoint.modules.values() if not m.quantised]
    writer.finish(config, floats)
    return len(quantised)


def _kv_scales(
    checkpoint: Checkpoint, config: Mapping[str, Any], int8_scheme: bool
) -> dict[str, torch.Tensor]:
    """Return KV scales float32 ``[kv_heads, head_dim]``, as ``….self_attn.k``."""
    if checkpoint.kv is None or checkpoint.kv.kind != "C8":
        return {}
    heads = int(config["num_attention_heads"])
    kv_heads = int(config.get("num_key_value_heads") or heads)
    head_dim = int(config.get("head_dim") or config["hidden_size"] // heads)
    layers = read_checkpoint_scales(checkpoint.folder, int8_scheme, kv_heads, head_dim)
    found = {}
    for index, scales in layers.items():
        found[f"model.layers.{index}.self_attn.k"] = scales.k_scale
        found[f"model.layers.{index}.self_attn.v"] = scales.v_scale
    return found


class _Modelslim:
    """Writes ModelSlim's files."""

    def __init__(self, folder: Path, dtype: torch.dtype) -> None:
        self._folder, self._dtype = folder, dtype
        self._shards = ShardWriter(folder, "quant_model_weights")
        self._types: dict[str, str] = {}
        self._groups: set[int] = set()
        self._has_kv = False

    def module(self, module: PortableModule) -> None:
        kind, tensors = modelslim_writer.module_tensors(module, self._dtype)
        if module.grouped:
            self._groups.add(module.about.group)
        for role, tensor in tensors.items():
            name = f"{module.about.name}.{role}"
            self._add(name, tensor, "FLOAT" if role == "bias" else kind)

    def float_tensor(self, name: str, tensor: torch.Tensor) -> None:
        self._add(name, tensor, "FLOAT")

    def kv_scale(self, name: str, scale: torch.Tensor) -> None:
        self._has_kv = True
        self._add(f"{name}_proj.kv_cache_scale", scale.flatten(), "C8")
        self._add(f"{name}_proj.kv_cache_offset", torch.zeros(scale.numel()), "C8")

    def finish(self, config: dict[str, Any], floats: list[ModuleScheme]) -> None:
        self._shards.finish()
        about = modelslim_writer.description(self._types, self._groups, self._has_kv)
        _write_json(self._folder / "quant_model_description.json", about)
        _write_json(self._folder / "config.json", config)

    def _add(self, name: str, tensor: torch.Tensor, kind: str) -> None:
        self._types[name] = kind
        self._shards.add(name, tensor)


class _Compressed:
    """Writes compressed-tensors' files."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._shards = ShardWriter(folder, "model")
        self._groups: dict[str, dict[str, Any]] = {}
        self._has_kv = False

    def module(self, module: PortableModule) -> None:
        group, tensors = compressed_writer.module_tensors(module)
        self._groups[module.about.name] = group
        for role, tensor in tensors.items():
            self._shards.add(f"{module.about.name}.{role}", tensor)

    def float_tensor(self, name: str, tensor: torch.Tensor) -> None:
        self._shards.add(name, tensor)

    def kv_scale(self, name: str, scale: torch.Tensor) -> None:
        per_head = scale[:, :1]
        if not bool((scale == per_head).all()):
            raise WeightToolError(
                f"{name}_proj.kv_cache_scale has a scale per channel; compressed-tensors has one "
                "per head at most. Serve the ModelSlim checkpoint as it is, or make scales with "
                "'ascend-plugin calibrate kv'."
            )
        self._has_kv = True
        self._shards.add(f"{name}_scale", per_head.reshape(-1, 1, 1))

    def finish(self, config: dict[str, Any], floats: list[ModuleScheme]) -> None:
        self._shards.finish()
        names = [m.name for m in floats if "embed" not in m.name.rpartition(".")[2]]
        if config.get("tie_word_embeddings") and "lm_head" not in names:
            names.append("lm_head")
        about = compressed_writer.quantization_config(self._groups, names, self._has_kv)
        _write_json(self._folder / "config.json", config | {"quantization_config": about})


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
