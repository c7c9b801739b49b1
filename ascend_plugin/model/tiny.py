"""Small random checkpoints of the architectures that engine tests need.

They have no tokenizer: start the engine with ``skip_tokenizer_init`` and give token ids. The
weights are scaled so that attention is not uniform, greedy output varies, and the next token
depends on the whole prompt, so that a wrong cache entry shows.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

_DTYPES = ("bfloat16", "float16", "float32")


@dataclass(frozen=True, slots=True)
class _Architecture:
    """What sets one architecture apart from Llama."""

    class_name: str
    qkv_bias: bool = False
    qk_norm: bool = False
    gemma: bool = False
    """Four norms in a layer that scale by 1 + weight, and tied, scaled embeddings."""
    window: bool = False
    softcap: bool = False
    experts: bool = False
    """Several networks in a layer, of which each token uses some."""
    mtp: bool = False
    """A layer that drafts the token after the next one, and is often right."""


ARCHITECTURES = {
    "llama": _Architecture("LlamaForCausalLM"),
    "qwen2": _Architecture("Qwen2ForCausalLM", qkv_bias=True),
    "qwen3": _Architecture("Qwen3ForCausalLM", qk_norm=True),
    "qwen3_moe": _Architecture("Qwen3MoeForCausalLM", qk_norm=True, experts=True),
    "mistral": _Architecture("MistralForCausalLM", window=True),
    "mimo": _Architecture("MiMoForCausalLM", qkv_bias=True, mtp=True),
    "gemma2": _Architecture("Gemma2ForCausalLM", gemma=True, window=True, softcap=True),
}
"""Architectures by ``model_type``; MiMo's is that of Qwen2, transformers knows no other."""

#: How much less the later layers of a model with a draft layer add than the first, which the draft
#: layer is a copy of: the less, the more drafts are right.
_LATER_LAYERS = 0.3
#: What a draft sees of the hidden state beside the embedding of the next token.
_HIDDEN_SHARE = 0.1


@dataclass(frozen=True, slots=True)
class _Shape:
    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    intermediate: int
    experts: int
    experts_per_token: int


def write_tiny_llama(
    path: Path,
    *,
    architecture: str = "llama",
    hidden: int = 128,
    layers: int = 2,
    heads: int = 4,
    kv_heads: int = 2,
    head_dim: int = 32,
    vocab: int = 256,
    intermediate: int = 256,
    experts: tuple[int, int] = (8, 2),
    dtype: str = "bfloat16",
    seed: int = 0,
    max_position: int = 4096,
    sliding_window: int | None = None,
    attn_softcap: float | None = None,
) -> Path:
    """Write a Llama-like model and return ``path``; the same arguments give the same bytes.

    Args:
        path: The directory, made if absent.
        architecture: One of `ARCHITECTURES`.
        hidden, layers, heads, kv_heads, head_dim, vocab, intermediate: Sizes, as in Hugging
            Face configurations. Token 0 is the first and 1 the last of a text.
        experts: For qwen3_moe: networks in a layer, and how many of them a token uses.
        dtype: ``bfloat16``, ``float16`` or ``float32``.
        seed: Seed of the weights.
        max_position: Longest context.
        sliding_window: Tokens that attention looks back, itself included; for mistral in
            every layer, for gemma2 in the even ones.
        attn_softcap: Soft cap of gemma2's attention logits.

    Raises:
        ValueError: If an argument is not supported.
    """
    from safetensors.torch import save_file

    shape = _Shape(hidden, layers, heads, kv_heads, head_dim, vocab, intermediate, *experts)
    if architecture not in ARCHITECTURES:
        raise ValueError(f"architecture {architecture!r}: choose one of {sorted(ARCHITECTURES)}")
    arch = ARCHITECTURES[architecture]
    _check(arch, shape, dtype, sliding_window, attn_softcap)
    model_type = "qwen2" if arch.mtp else architecture
    config = {"model_type": model_type, "torch_dtype": dtype, **_shape_config(shape)}
    config |= _special_config(arch, shape, sliding_window, attn_softcap, max_position)
    path.mkdir(parents=True, exist_ok=True)
    (path / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    save_file(_weights(arch, shape, dtype, seed), path / "model.safetensors", {"format": "pt"})
    return path


def _check(
    arch: _Architecture, shape: _Shape, dtype: str, window: int | None, softcap: float | None
) -> None:
    """Raises ValueError for arguments that make no model, or not the asked one."""
    if dtype not in _DTYPES:
        raise ValueError(f"dtype {dtype!r}: choose one of {_DTYPES}")
    if shape.heads % shape.kv_heads or shape.head_dim % 2:
        raise ValueError(
            f"{shape.heads} heads, {shape.kv_heads} kv heads of {shape.head_dim}: heads must be "
            "a multiple of kv heads, and head_dim even"
        )
    if arch.qkv_bias and shape.heads * shape.head_dim != shape.hidden:
        # vLLM computes Qwen2's head_dim and does not read it.
        raise ValueError(
            f"{shape.heads} heads of {shape.head_dim}: {arch.class_name} needs "
            f"heads * head_dim = hidden = {shape.hidden}"
        )
    for name, value, supported in (
        ("sliding_window", window, arch.window),
        ("attn_softcap", softcap, arch.softcap),
    ):
        if value is not None and not supported:
            raise ValueError(f"{name}={value}: {arch.class_name} has none, leave it out")


def _shape_config(shape: _Shape) -> dict[str, Any]:
    return {
        "vocab_size": shape.vocab,
        "hidden_size": shape.hidden,
        "intermediate_size": shape.intermediate,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "head_dim": shape.head_dim,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "pad_token_id": 1,
    }


def _special_config(
    arch: _Architecture,
    shape: _Shape,
    window: int | None,
    softcap: float | None,
    max_position: int,
) -> dict[str, Any]:
    """Returns the part of the configuration that differs between architectures."""
    config: dict[str, Any] = {
        "architectures": [arch.class_name],
        "max_position_embeddings": max_position,
        "tie_word_embeddings": arch.gemma,
        "attention_bias": arch.qkv_bias,
    }
    if arch.experts:
        config |= {
            "num_experts": shape.experts,
            "num_experts_per_tok": shape.experts_per_token,
            "moe_intermediate_size": shape.intermediate,
            "norm_topk_prob": True,
            "decoder_sparse_step": 1,
            "mlp_only_layers": [],
        }
    if arch.mtp:
        config |= {"num_nextn_predict_layers": 1, "use_sliding_window": False}
    if not arch.gemma:
        config["hidden_act"] = "silu"
        return config | ({"sliding_window": window} if arch.window else {})
    kinds = ("sliding_attention" if window else "full_attention", "full_attention")
    return config | {
        "hidden_activation": "gelu_pytorch_tanh",
        "query_pre_attn_scalar": shape.head_dim,
        "attn_logit_softcapping": softcap,
        "final_logit_softcapping": None,
        # transformers wants a number even where no layer has a window.
        "sliding_window": window or max_position,
        "layer_types": [kinds[i % 2] for i in range(shape.layers)],
    }


def _weights(arch: _Architecture, shape: _Shape, dtype: str, seed: int) -> dict[str, torch.Tensor]:
    """Draws the weights; every norm is a little uneven so that a skipped one shows."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    weights = {}
    for name, size, scale, mean in _parameters(arch, shape):
        values = torch.randn(size, generator=generator) * scale + mean
        weights[name] = values.to(getattr(torch, dtype))
    if arch.mtp:
        weights |= _draft_layer(weights, shape)
    return weights


def _draft_layer(weights: dict[str, torch.Tensor], shape: _Shape) -> dict[str, torch.Tensor]:
    """Returns a layer in MiMo's layout that does to the next token what the first layer does."""
    import torch

    first, draft = "model.layers.0.", "model.mtp_layers.0."
    for name, weight in weights.items():
        later = name.startswith("model.layers.") and not name.startswith(first)
        if later and name.endswith(("o_proj.weight", "down_proj.weight")):
            weight *= _LATER_LAYERS
    found = {
        draft + name.removeprefix(first): weight.clone()
        for name, weight in weights.items()
        if name.startswith(first)
    }
    norm = weights["model.norm.weight"]
    unit = torch.eye(shape.hidden, dtype=norm.dtype)
    found[draft + "input_proj.weight"] = torch.cat([_HIDDEN_SHARE * unit, unit], 1)
    found[draft + "final_layernorm.weight"] = norm.clone()
    for part in ("token", "hidden"):
        found[f"{draft}{part}_layernorm.weight"] = torch.ones_like(norm)
    return found


def _parameters(
    arch: _Architecture, shape: _Shape
) -> Iterator[tuple[str, tuple[int, ...], float, float]]:
    """Yields name, shape, standard deviation and mean of every weight.

    Matrices are scaled by 1 / sqrt(in_features), which keeps activations at unit size, and
    those of query and key a little more, which makes attention uneven.
    """
    hidden, norm_mean = shape.hidden, 0.0 if arch.gemma else 1.0
    query, kv = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    unit = hidden**-0.5
    # Gemma2 multiplies embeddings by sqrt(hidden) and ties them to the output: kept small,
    # or each token would predict itself; its last norm makes up for it.
    embedding, last_norm = (2 / hidden, 1.2 * hidden**0.5) if arch.gemma else (1.0, 1.0)
    yield "model.embed_tokens.weight", (shape.vocab, hidden), embedding, 0.0
    yield "model.norm.weight", (hidden,), 0.1, last_norm
    if not arch.gemma:
        yield "lm_head.weight", (shape.vocab, hidden), 3 * unit, 0.0
    norms = ["input_layernorm", "post_attention_layernorm"]
    if arch.gemma:
        norms += ["pre_feedforward_layernorm", "post_feedforward_layernorm"]
    for i in range(shape.layers):
        layer = f"model.layers.{i}"
        for norm in norms:
            yield f"{layer}.{norm}.weight", (hidden,), 0.1, norm_mean
        for part, rows, gain in (("q", query, 1.5), ("k", kv, 1.5), ("v", kv, 1.0)):
            yield f"{layer}.self_attn.{part}_proj.weight", (rows, hidden), gain * unit, 0.0
            if arch.qkv_bias:
                yield f"{layer}.self_attn.{part}_proj.bias", (rows,), 0.1, 0.0
            if arch.qk_norm and part != "v":
                yield f"{layer}.self_attn.{part}_norm.weight", (shape.head_dim,), 0.1, 1.5
        yield f"{layer}.self_attn.o_proj.weight", (hidden, query), query**-0.5, 0.0
        if not arch.experts:
            yield from _network(f"{layer}.mlp", shape)
            continue
        # Far enough apart that rounding does not change a choice of experts.
        yield f"{layer}.mlp.gate.weight", (shape.experts, hidden), 4 * unit, 0.0
        for expert in range(shape.experts):
            yield from _network(f"{layer}.mlp.experts.{expert}", shape)


def _network(prefix: str, shape: _Shape) -> Iterator[tuple[str, tuple[int, ...], float, float]]:
    """Yields name, shape, standard deviation and mean of the weights of one MLP."""
    hidden, inner = shape.hidden, shape.intermediate
    for part in ("gate", "up"):
        yield f"{prefix}.{part}_proj.weight", (inner, hidden), hidden**-0.5, 0.0
    yield f"{prefix}.down_proj.weight", (hidden, inner), inner**-0.5, 0.0
