"""``config.json`` of dense decoders with drawn weights, which benchmarks run."""

from __future__ import annotations

from typing import Any, Literal

Architecture = Literal["llama", "qwen3"]

#: The class of transformers and vLLM for each architecture.
CLASSES: dict[Architecture, str] = {"llama": "LlamaForCausalLM", "qwen3": "Qwen3ForCausalLM"}


def decoder_config(
    architecture: Architecture,
    *,
    layers: int,
    hidden: int,
    intermediate: int,
    heads: int,
    kv_heads: int,
    head_dim: int,
    vocabulary: int,
    positions: int,
) -> dict[str, Any]:
    """Return the configuration of a bfloat16 decoder with tied embeddings."""
    return {
        "architectures": [CLASSES[architecture]],
        "model_type": architecture,
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": head_dim,
        "vocab_size": vocabulary,
        "max_position_embeddings": positions,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1000000.0,
        "hidden_act": "silu",
        "attention_bias": False,
        "tie_word_embeddings": True,
        "torch_dtype": "bfloat16",
        "bos_token_id": 0,
        "eos_token_id": 1,
    }
