"""A quantised checkpoint as transformers' model: what its numbers mean, on any device.

Weights are dequantised; inputs are quantised and dequantised where the checkpoint says so, and
rotated where it rotates. A device may do better: a CPU keeps the inputs of 4-bit weights 16-bit.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from ascend_plugin.kv_cache.checkpoint import is_int8_scheme, is_kv_scale
from ascend_plugin.kv_eval.model import widen_head
from ascend_plugin.quantization.formats import describe, read_quantization_config
from ascend_plugin.quantization.rotate import Rotate
from ascend_plugin.quantization.scheme import Checkpoint, ModuleScheme
from ascend_plugin.quantization.unpack import StaticInput
from ascend_plugin.weight_tools.errors import WeightToolError
from ascend_plugin.weight_tools.experts import ExpertName, replace_experts
from ascend_plugin.weight_tools.portable import PortableModule, read_module


class MeantLinear(torch.nn.Module):
    """A linear layer that computes what a quantised one means, in the input's type."""

    def __init__(self, module: PortableModule, checkpoint: Checkpoint, dtype: torch.dtype) -> None:
        """Dequantise the weight."""
        super().__init__()
        self.weight: torch.Tensor
        self.bias: torch.Tensor | None
        self.input = module.about.input
        self.static = module.static
        bias = None if module.bias is None else module.bias.to(dtype)
        self.register_buffer("weight", dequantise(module).to(dtype), persistent=False)
        self.register_buffer("bias", bias, persistent=False)
        rotations = module.about.rotations
        before = [Rotate(each, checkpoint.index) for each in rotations if each.location == "input"]
        after = [Rotate(each, checkpoint.index) for each in rotations if each.location == "output"]
        self.before, self.after = torch.nn.ModuleList(before), torch.nn.ModuleList(after)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Multiply ``[…, k]``."""
        rows = x.flatten(0, -2)
        for rotate in self.before:
            rows = rotate(rows)
        out = torch.nn.functional.linear(self._quantised(rows), self.weight, self.bias)
        for rotate in self.after:
            out = rotate(out)
        return out.unflatten(0, x.shape[:-1])

    def _quantised(self, x: torch.Tensor) -> torch.Tensor:
        if self.input is None:
            return x
        if self.static is not None:
            return fake_static(x, self.static)
        return fake_per_token(x, self.input.symmetric)


def dequantise(module: PortableModule) -> torch.Tensor:
    """Return a module's weight, float32 ``[n, k]``."""
    about = module.about
    group = torch.arange(about.k) // about.group if module.groups_of is None else module.groups_of
    codes = module.codes.float()
    if module.zeros is not None:
        codes = codes - module.zeros.reshape(about.n, -1).float()[:, group]
    return codes * module.scales.float().reshape(about.n, -1)[:, group]


def fake_static(x: torch.Tensor, static: StaticInput) -> torch.Tensor:
    """Return inputs as int8 with a checkpoint's numbers gives them back."""
    codes = (x.float() / static.scale + static.zero).round().clamp(-128, 127)
    return ((codes - static.zero) * static.scale).to(x.dtype)


def fake_per_token(x: torch.Tensor, symmetric: bool) -> torch.Tensor:
    """Return inputs as int8 with a scale per token gives them back."""
    rows = x.float()
    if symmetric:
        scale = (rows.abs().amax(-1, keepdim=True) / 127).clamp_min(1e-12)
        return ((rows / scale).round().clamp(-127, 127) * scale).to(x.dtype)
    low = rows.amin(-1, keepdim=True).clamp(max=0)
    high = rows.amax(-1, keepdim=True).clamp(min=0)
    scale = ((high - low) / 255).clamp_min(1e-12)
    zero = (-128 - low / scale).round()
    codes = ((rows / scale).round() + zero).clamp(-128, 127)
    return ((codes - zero) * scale).to(x.dtype)


def load_meaning(folder: Path, dtype: torch.dtype) -> tuple[Any, Checkpoint]:
    """Load a quantised checkpoint into transformers.

    Args:
        folder: of the checkpoint.
        dtype: to compute in.

    Raises:
        WeightToolError: it is not quantised, or is no causal language model.
        CheckpointError: it is not what it says.
    """
    checkpoint = describe(folder)
    if checkpoint is None:
        raise WeightToolError(
            f"{folder} is not quantised in a way that is read here. Name the float model first, "
            "then checkpoints of ModelSlim, compressed-tensors, GPTQ, AWQ or auto-round."
        )
    model = _empty_model(folder, dtype)
    modules = {
        name: about
        for name, about in checkpoint.modules.items()
        if about.quantised or about.rotations or ExpertName.of(name)
    }
    replace_experts(model, modules, lambda name: _linear(checkpoint, modules[name], dtype))
    for name, about in modules.items():
        if not ExpertName.of(name):
            _replace(model, name, _linear(checkpoint, about, dtype))
    taken = {info.name for about in modules.values() for info in about.tensors.values()}
    taken |= checkpoint.unused
    int8_scheme = is_int8_scheme(read_quantization_config(folder))
    rest = {
        name: checkpoint.index.read(name).to(dtype)
        for name in checkpoint.index
        if name not in taken and not is_kv_scale(name, int8_scheme)
    }
    missing, unexpected = model.load_state_dict(rest, strict=False)
    model.tie_weights()
    lacking = [name for name in missing if not (name == "lm_head.weight" and _tied(model))]
    if lacking or unexpected:
        names = ", ".join([*lacking, *unexpected][:3])
        raise WeightToolError(
            f"{folder}: these tensors do not fit the model of its config.json: {names}. "
            "Copy or download the checkpoint again."
        )
    if isinstance(model.get_output_embeddings(), torch.nn.Linear):
        widen_head(model)
    return model.eval(), checkpoint


def _linear(checkpoint: Checkpoint, about: ModuleScheme, dtype: torch.dtype) -> torch.nn.Module:
    if about.quantised:
        return MeantLinear(read_module(checkpoint, about), checkpoint, dtype)
    parts = {role: checkpoint.index.read(info.name) for role, info in about.tensors.items()}
    whole = torch.ones(about.n, 1)
    plain = PortableModule(about, parts["weight"], whole, None, None, None, parts.get("bias"))
    return MeantLinear(plain, checkpoint, dtype)


def _empty_model(folder: Path, dtype: torch.dtype) -> Any:
    from transformers import AutoConfig, AutoModelForCausalLM

    config = json.loads((folder / "config.json").read_text())
    config.pop("quantization_config", None)
    config.pop("compression_config", None)
    try:
        kind = AutoConfig.for_model(config.pop("model_type"), **config)
        return AutoModelForCausalLM.from_config(kind, dtype=dtype)
    except (KeyError, ValueError) as error:
        raise WeightToolError(
            f"{folder}: config.json describes no causal language model of transformers ({error})."
        ) from error


def _tied(model: Any) -> bool:
    return bool(model.config.get_text_config().tie_word_embeddings)


def _replace(model: torch.nn.Module, name: str, linear: torch.nn.Module) -> None:
    parent, _, last = name.rpartition(".")
    try:
        setattr(model.get_submodule(parent), last, linear)
    except AttributeError as error:
        raise WeightToolError(
            f"the checkpoint has a module {name}, the model of its config.json has none."
        ) from error
