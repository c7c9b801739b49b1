"""LoRA adapters for tiny models, and the models that they mean."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

#: Projections that are adapted: every linear layer of a decoder layer.
TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def write_adapter(model: str, path: Path, seed: int, rank: int = 8) -> str:
    """Write a random adapter that changes a model's choices; return its path.

    Args:
        model: folder of the model.
        path: folder of the adapter.
        seed: of its weights.
        rank: of its matrices.
    """
    generator = torch.Generator().manual_seed(seed)
    weights = {}
    for name, weight in _adapted(model).items():
        rows, columns = weight.shape
        base = f"base_model.model.{name.removesuffix('.weight')}"
        a = torch.randn((rank, columns), generator=generator) * columns**-0.5
        b = torch.randn((rows, rank), generator=generator) * 0.25 * rank**-0.5
        weights[f"{base}.lora_A.weight"] = a.to(weight.dtype)
        weights[f"{base}.lora_B.weight"] = b.to(weight.dtype)
    path.mkdir(parents=True)
    save_file(weights, path / "adapter_model.safetensors", {"format": "pt"})
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": 2 * rank}
    config |= {"target_modules": list(TARGETS), "bias": "none", "task_type": "CAUSAL_LM"}
    (path / "adapter_config.json").write_text(json.dumps(config))
    return str(path)


def write_merged(model: str, adapter: str, path: Path) -> str:
    """Write the model with the adapter's products added to its weights; return its path."""
    merged = load_file(Path(model) / "model.safetensors")
    config = json.loads((Path(adapter) / "adapter_config.json").read_text())
    parts = load_file(Path(adapter) / "adapter_model.safetensors")
    for name in _adapted(model):
        base = f"base_model.model.{name.removesuffix('.weight')}"
        a, b = (parts[f"{base}.lora_{each}.weight"].double() for each in "AB")
        whole = merged[name].double() + config["lora_alpha"] / config["r"] * (b @ a)
        merged[name] = whole.to(merged[name].dtype)
    path.mkdir(parents=True)
    (path / "config.json").write_text((Path(model) / "config.json").read_text())
    save_file(merged, path / "model.safetensors", {"format": "pt"})
    return str(path)


def _adapted(model: str) -> dict[str, torch.Tensor]:
    weights = load_file(Path(model) / "model.safetensors")
    return {name: each for name, each in weights.items() if name.split(".")[-2] in TARGETS}
