"""Tiny random models with latent attention (MLA), and what Hugging Face says they generate."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from engines import Output
from safetensors.torch import load_file, save_file

_SHAPE = {
    "vocab_size": 256,
    "hidden_size": 128,
    "intermediate_size": 256,
    "moe_intermediate_size": 64,
    "num_hidden_layers": 2,
    "first_k_dense_replace": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "kv_lora_rank": 64,
    "qk_nope_head_dim": 32,
    "qk_rope_head_dim": 16,
    "v_head_dim": 32,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_shared_experts": 1,
    "n_group": 1,
    "topk_group": 1,
    "max_position_embeddings": 4096,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 1,
    "initializer_range": 0.12,
}

#: DeepSeek's own sizes of latents and rotary parts, which are what the NPU's fused attention reads.
NPU_LATENTS = {"kv_lora_rank": 512, "qk_rope_head_dim": 64}

#: Settings that set a version of the architecture apart.
_VERSIONS: dict[str, dict[str, Any]] = {
    "v3": {
        "q_lora_rank": 48,
        "topk_method": "noaux_tc",  # vLLM makes the bias of the routing for this one only
        "scoring_func": "sigmoid",
        "norm_topk_prob": True,
        "routed_scaling_factor": 1.5,
    },
    "v2": {
        "q_lora_rank": None,
        "topk_method": "greedy",
        "norm_topk_prob": False,
        "routed_scaling_factor": 1.0,
    },
}


def write_tiny_deepseek(path: Path, version: str = "v3", **changes: Any) -> str:
    """Write a random float32 model and return its folder.

    Args:
        path: the folder.
        version: ``v3`` (compressed queries, sigmoid routing) or ``v2`` (as V2-Lite).
        changes: settings of the Hugging Face configuration.
    """
    model = make_model(version, changes)
    draw(model)
    model.save_pretrained(path)
    return str(path)


def make_model(version: str, changes: dict[str, Any]) -> Any:
    """Return Hugging Face's model; arguments as in :func:`write_tiny_deepseek`."""
    return _model_class(version)(_config(version, changes))


def draw(model: Any) -> None:
    """Draw weights so that attention is uneven and output varies."""
    torch.manual_seed(0)
    for name, parameter in model.named_parameters():
        if "norm" in name:
            torch.nn.init.normal_(parameter, mean=1.0, std=0.2)
        elif "embed" in name or "lm_head" in name:
            torch.nn.init.normal_(parameter, std=0.6)
        else:
            torch.nn.init.normal_(parameter, std=1.2 * parameter.shape[-1] ** -0.5)


def _config(version: str, changes: dict[str, Any]) -> Any:
    from transformers import DeepseekV2Config, DeepseekV3Config

    config = DeepseekV3Config if version == "v3" else DeepseekV2Config
    return config(**{**_SHAPE, **_VERSIONS[version], **changes})


def _model_class(version: str) -> Any:
    from transformers import DeepseekV2ForCausalLM, DeepseekV3ForCausalLM

    return DeepseekV3ForCausalLM if version == "v3" else DeepseekV2ForCausalLM


def write_with_scales(path: Path, source: str, scale: float) -> str:
    """Copy a model and add ModelSlim's scales of latents to the layers of its base."""
    shutil.copytree(source, path)
    layers = json.loads((path / "config.json").read_text())["num_hidden_layers"]
    file = path / "model.safetensors"
    weights = load_file(file)
    for layer in range(layers):
        prefix = f"model.layers.{layer}.self_attn.fa_"
        for part in "qkv":
            weights[f"{prefix}{part}.scale"] = torch.full((1, 1), scale)
            weights[f"{prefix}{part}.offset"] = torch.zeros(1, 1)
    save_file(weights, file, {"format": "pt"})
    return str(path)


def generate(path: str, prompts: list[list[int]], max_tokens: int) -> list[Output]:
    """Return what Hugging Face's own model generates greedily."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(
        path, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    with torch.no_grad():
        return [_complete(model, prompt, max_tokens) for prompt in prompts]


def _complete(model: Any, prompt: list[int], max_tokens: int) -> Output:
    tokens: list[int] = []
    logprobs: list[float] = []
    margins: list[float] = []
    step, cache = torch.tensor([prompt]), None
    for _ in range(max_tokens):
        answer = model(step, past_key_values=cache, use_cache=True)
        cache = answer.past_key_values
        best = answer.logits[0, -1].log_softmax(-1).topk(2)
        tokens.append(int(best.indices[0]))
        logprobs.append(float(best.values[0]))
        margins.append(float(best.values[0] - best.values[1]))
        step = best.indices[:1][None]
    return Output(tokens, logprobs, margins, 0)
