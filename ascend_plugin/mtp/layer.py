"""The draft layer in plain torch, for training; its parameters are named as in MiMo's checkpoints.

The same arithmetic as vLLM's ``MiMoMultiTokenPredictorLayer``: hidden state and embedding are
normed, joined (hidden state first) and projected to the width of the model, then comes one decoder
layer. At position 0 the embedding is zero.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import nn
from torch.nn import functional

if TYPE_CHECKING:
    from ascend_plugin.mtp.base import BaseModel, LayerShape

#: What the parameters are called in a checkpoint.
PREFIX = "model.mtp_layers.0."
#: The block begins as the base's last layer, but quiet: what it adds must not drown its input.
_QUIET = 0.1
#: Weight of the embedding beside the hidden state at the start.
_EMBEDDING_SHARE = 0.5
_NOISE = 0.005


class Norm(nn.Module):
    """RMS norm."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Norm the last dimension, in float32."""
        return functional.rms_norm(x.float(), self.weight.shape, self.weight, self.eps)


@dataclass(frozen=True, slots=True, eq=False)
class Keys:
    """Keys and values of one pass, ``[batch, kv_heads, tokens, head_dim]``."""

    key: torch.Tensor
    value: torch.Tensor


class Attention(nn.Module):
    """Grouped-query attention over the passes so far."""

    def __init__(self, shape: LayerShape) -> None:
        super().__init__()
        self.shape = shape
        rows = shape.kv_heads * shape.head_dim
        self.q_proj = nn.Linear(shape.hidden, shape.hidden)
        self.k_proj = nn.Linear(shape.hidden, rows)
        self.v_proj = nn.Linear(shape.hidden, rows)
        self.o_proj = nn.Linear(shape.hidden, shape.hidden, bias=False)

    def forward(
        self, x: torch.Tensor, rope: tuple[torch.Tensor, torch.Tensor], passes: list[Keys]
    ) -> torch.Tensor:
        """Attend; this pass's keys are appended to ``passes``."""
        batch, tokens, _ = x.shape
        parts = [
            projection(x).view(batch, tokens, -1, self.shape.head_dim).transpose(1, 2)
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        ]
        query, key = (_rotate(part, rope) for part in parts[:2])
        passes.append(Keys(key, parts[2]))
        first = len(passes) == 1
        out = functional.scaled_dot_product_attention(
            query,
            torch.cat([kept.key for kept in passes], 2),
            torch.cat([kept.value for kept in passes], 2),
            attn_mask=None if first else pass_mask(tokens, len(passes), x.device),
            is_causal=first,
            enable_gqa=True,
        )
        return self.o_proj(out.transpose(1, 2).flatten(2))


class MLP(nn.Module):
    """SwiGLU."""

    def __init__(self, shape: LayerShape) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(shape.hidden, shape.intermediate, bias=False)
        self.up_proj = nn.Linear(shape.hidden, shape.intermediate, bias=False)
        self.down_proj = nn.Linear(shape.intermediate, shape.hidden, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Apply."""
        return self.down_proj(functional.silu(self.gate_proj(x)) * self.up_proj(x))


class MTPLayer(nn.Module):
    """The layer; what it returns goes into the base's projection to logits."""

    def __init__(self, shape: LayerShape) -> None:
        """Draw weights; ``start_from`` gives better ones."""
        super().__init__()
        self.token_layernorm = Norm(shape.hidden, shape.eps)
        self.hidden_layernorm = Norm(shape.hidden, shape.eps)
        self.input_proj = nn.Linear(2 * shape.hidden, shape.hidden, bias=False)
        self.input_layernorm = Norm(shape.hidden, shape.eps)
        self.self_attn = Attention(shape)
        self.post_attention_layernorm = Norm(shape.hidden, shape.eps)
        self.mlp = MLP(shape)
        self.final_layernorm = Norm(shape.hidden, shape.eps)

    @torch.no_grad()
    def start_from(self, base: BaseModel) -> None:
        """Begin as the base's last layer between an input that mixes and the base's final norm."""
        own = self.state_dict()
        for name, weight in base.last_layer.state_dict().items():
            own[name].copy_(weight)  # a base without biases leaves them as they are: zeroed below
        biased = base.last_layer.self_attn.q_proj.bias is not None
        for projection in (self.self_attn.q_proj, self.self_attn.k_proj, self.self_attn.v_proj):
            if not biased:
                projection.bias.zero_()
        self.self_attn.o_proj.weight.mul_(_QUIET)
        self.mlp.down_proj.weight.mul_(_QUIET)
        self.final_layernorm.weight.copy_(base.norm)
        width = base.shape.hidden
        mixed = torch.cat([torch.eye(width), _EMBEDDING_SHARE * torch.eye(width)], 1)
        generator = torch.Generator().manual_seed(0)
        mixed += _NOISE * torch.randn(width, 2 * width, generator=generator)
        self.input_proj.weight.copy_(mixed)

    def forward(
        self,
        hidden: torch.Tensor,
        embedding: torch.Tensor,
        rope: tuple[torch.Tensor, torch.Tensor],
        passes: list[Keys],
    ) -> torch.Tensor:
        """Run one pass over sequences.

        Args:
            hidden: ``[batch, tokens, hidden]``: in the first pass the base's at each position; in
                later ones this layer's own output at the position before.
            embedding: ``[batch, tokens, hidden]``, of the token after each position.
            rope: cosines and sines ``[tokens, head_dim]``.
            passes: keys of earlier passes; this one's are appended.

        Returns:
            ``[batch, tokens, hidden]``, normed: ``@ head.T`` are the logits of the token after the
            next.
        """
        embedding = torch.cat([torch.zeros_like(embedding[:, :1]), embedding[:, 1:]], 1)
        x = self.input_proj(
            torch.cat([self.hidden_layernorm(hidden), self.token_layernorm(embedding)], -1)
        )
        x = x + self.self_attn(self.input_layernorm(x), rope, passes)
        x = x + self.mlp(self.post_attention_layernorm(x))
        return self.final_layernorm(x)


def shift(output: torch.Tensor) -> torch.Tensor:
    """Return a pass's output as the hidden states of the next: one position later."""
    return torch.cat([output[:, :1], output[:, :-1]], 1)


def pass_mask(tokens: int, passes: int, device: torch.device) -> torch.Tensor:
    """Return which keys the last pass sees, bool ``[tokens, passes * tokens]``.

    A draft chain that reaches position p in pass s computed its own keys of the last s - 1
    positions in passes 2 to s; those before are of the first pass.
    """
    back = torch.arange(tokens, device=device)
    back = back[:, None] - back[None, :]  # [query, key]
    blocks = [back >= passes - 1] + [back == passes - i for i in range(2, passes + 1)]
    return torch.cat(blocks, 1)


def _rotate(x: torch.Tensor, rope: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    """Apply rotary embedding (halves, as in Llama) to ``[batch, heads, tokens, head_dim]``."""
    cos, sin = (part.to(x.dtype) for part in rope)
    first, second = x.chunk(2, -1)
    return x * cos + torch.cat([-second, first], -1) * sin
