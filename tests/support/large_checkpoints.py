"""Checkpoints large enough for their bytes to stand out of a process' memory; weights are drawn."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from quant_checkpoints import LINEAR, compressed_config, set_config
from safetensors.torch import load_file, save_file

from ascend_plugin.model.tiny import write_tiny_llama

#: 94 million weights in matrices.
SHAPE: dict[str, Any] = {
    "hidden": 1024,
    "intermediate": 4096,
    "layers": 6,
    "heads": 16,
    "kv_heads": 8,
    "head_dim": 64,
}
GROUP = 64
_INPUTS = {"num_bits": 8, "type": "int", "symmetric": True, "group_size": None}
#: What stands for the inputs of layers; None: they are not quantised.
INPUTS: dict[str, dict[str, Any] | None] = {
    "bf16": None,
    "w4a16": None,
    "w8a8": _INPUTS | {"strategy": "token", "dynamic": True},
    "w8a8-static": _INPUTS | {"strategy": "tensor", "dynamic": False},
}


def write_large(folder: Path, scheme: str) -> Path:
    """Write a bfloat16 Llama whose layers are of a scheme of :data:`INPUTS`; return its folder."""
    write_tiny_llama(folder, dtype="bfloat16", **SHAPE)
    if scheme == "bf16":
        return folder
    generator = torch.Generator().manual_seed(1)
    tensors: dict[str, torch.Tensor] = {}
    for name, weight in load_file(folder / "model.safetensors").items():
        module = name.removesuffix(".weight")
        if not module.endswith(LINEAR):
            tensors[name] = weight
            continue
        for role, tensor in _draw(scheme, *weight.shape, generator).items():
            tensors[f"{module}.{role}"] = tensor
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    inputs = INPUTS[scheme]
    config = compressed_config(8, inputs=inputs) if inputs else compressed_config(4, GROUP)
    set_config(folder, config)
    return folder


def _draw(scheme: str, n: int, k: int, generator: torch.Generator) -> dict[str, torch.Tensor]:
    """Return the tensors of a layer, in llm-compressor's form; outputs are of unit size."""
    if scheme == "w4a16":
        words = torch.randint(
            -(2**31), 2**31 - 1, (n, k // 8), dtype=torch.int32, generator=generator
        )
        scale = torch.full((n, k // GROUP), 1 / (4.6 * k**0.5), dtype=torch.bfloat16)
        shape = torch.tensor([n, k])
        return {"weight_packed": words, "weight_scale": scale, "weight_shape": shape}
    tensors = {
        "weight": torch.randint(-128, 128, (n, k), dtype=torch.int8, generator=generator),
        "weight_scale": torch.full((n, 1), 1 / (74 * k**0.5), dtype=torch.bfloat16),
    }
    static = {"input_scale": torch.tensor([0.03])} if scheme == "w8a8-static" else {}
    return tensors | static
