"""A draft model in EAGLE's layout for a tiny model of MiMo's."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file


def write_eagle(path: Path, target: Path) -> Path:
    """Write a draft whose one layer is the target's first; it looks at the next token alone.

    EAGLE's layer has no norm before attention, and no final one: the target's embeddings are of
    unit size, so it hardly matters, and the weights of the first norm go into the projections.
    """
    config = json.loads((target / "config.json").read_text())
    kept = ("vocab_size", "hidden_size", "intermediate_size", "num_attention_heads", "head_dim")
    kept += ("num_key_value_heads", "rms_norm_eps", "rope_theta", "max_position_embeddings")
    draft = {name: config[name] for name in kept} | {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "num_hidden_layers": 1,
        "hidden_act": "silu",
        "torch_dtype": config["torch_dtype"],
        "tie_word_embeddings": False,
    }
    weights = load_file(target / "model.safetensors")
    first = "model.layers.0."
    found = {
        name.removeprefix("model."): weight.clone()
        for name, weight in weights.items()
        if name.startswith(first) and not name.endswith((".bias", "input_layernorm.weight"))
    }
    norm = weights[first + "input_layernorm.weight"]
    for part in "qkv":
        found[f"layers.0.self_attn.{part}_proj.weight"] *= norm
    unit = torch.eye(config["hidden_size"], dtype=norm.dtype)
    found["fc.weight"] = torch.cat([unit, torch.zeros_like(unit)], 1)
    path.mkdir(parents=True)
    (path / "config.json").write_text(json.dumps(draft, indent=2))
    save_file(found, path / "model.safetensors", {"format": "pt"})
    return path
