"""A tiny Llama in plain torch with a fake-quantised KV cache: what int8 engines are compared with.

Nothing here uses vLLM, pages or the plugin's operators. A whole sequence is one forward pass, in
float64 but for the quantisation: K and V become what an int8 page would give back.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from engines import Output
from implementations import threads
from safetensors.torch import load_file


def _turn(dim: int) -> torch.Tensor:
    """Return what rotates keys: Walsh-Hadamard blocks of the largest power of two in ``dim``."""
    block = torch.ones(1, 1)
    while dim % (2 * block.shape[0]) == 0:
        block = torch.cat([torch.cat([block, block], 1), torch.cat([block, -block], 1)])
    return torch.block_diag(*[block] * (dim // block.shape[0]))


@dataclass(frozen=True, slots=True, eq=False)
class FakeCache:
    """What a layer's cache does to K and V.

    ``scales`` are float32 ``[2, kv_heads, head_dim]``, ``thresholds`` those of K and V.
    """

    variant: str = "auto"
    scales: torch.Tensor | None = None
    thresholds: tuple[float, float] = (0.0, 0.0)
    code: str = "int4"
    block_size: int = 128

    def __call__(self, rows: torch.Tensor, side: int) -> torch.Tensor:
        """Return ``[tokens, kv_heads, head_dim]`` as read back; side 0 is K, 1 is V."""
        if self.variant == "auto":
            return rows
        x = rows.float()
        if self.variant == "c8d":
            turn = _turn(x.shape[-1]) if side == 0 else torch.eye(x.shape[-1])
            x = x @ turn
            scale = x.abs().amax(-1, keepdim=True) / 127
            kept = ((x * (1 / scale)).round().clamp(-127, 127) * scale).double()
            return kept @ turn.double().inverse()
        scale = self.scales[side]
        codes = (x * (1 / scale)).round().clamp(-127, 127)
        if self.variant == "c8p":
            codes = codes + self._patches(x, x * (1 / scale) - codes, scale, self.thresholds[side])
        return (codes * scale).double()

    def _patches(
        self, x: torch.Tensor, residual: torch.Tensor, scale: torch.Tensor, threshold: float
    ) -> torch.Tensor:
        """Return the residuals of rows that are outliers and find their slot free."""
        error = (residual * scale).square().sum(-1).sqrt() / x.square().sum(-1).sqrt()
        slots = self.block_size // 8
        found = torch.zeros_like(residual)
        taken = set()
        for token, head in (error > threshold).nonzero().tolist():  # in the order of tokens
            place = (token // self.block_size, token % self.block_size % slots, head)
            if place not in taken:
                taken.add(place)
                found[token, head] = self._coded(residual[token, head])
        return found

    def _coded(self, residual: torch.Tensor) -> torch.Tensor:
        if self.code == "int4":
            scale = residual.abs().max() / 7
            return (residual / scale).round() * scale
        scale = residual.abs().max() / 64
        values = torch.tensor([0.0, 1, 2, 4, 8, 16, 32, 64])
        nearest = (values - (residual.abs() / scale)[:, None]).abs().argmin(-1)
        return values[nearest] * residual.sign() * scale


class OfflineLlama:
    """A model of ``write_tiny_llama``: llama, mistral, qwen3 or qwen3_moe."""

    def __init__(self, path: str) -> None:
        self.config = json.loads((Path(path) / "config.json").read_text())
        weights = load_file(Path(path) / "model.safetensors")
        self.weights = {name: tensor.double() for name, tensor in weights.items()}
        self.layers: int = self.config["num_hidden_layers"]
        self.kv_heads: int = self.config["num_key_value_heads"]
        self.head_dim: int = self.config["head_dim"]

    def logprobs(self, tokens: Sequence[int], caches: Sequence[FakeCache]) -> torch.Tensor:
        """Return the log-probabilities ``[tokens, vocabulary]`` of what follows each token."""
        with threads(1):  # on a busy machine two threads wait for each other at every operation
            return self._logprobs(tokens, caches)

    def _logprobs(self, tokens: Sequence[int], caches: Sequence[FakeCache]) -> torch.Tensor:
        x = self.weights["model.embed_tokens.weight"][list(tokens)]
        for i, cache in enumerate(caches):
            layer = f"model.layers.{i}."
            x = x + self._attention(layer, self._norm(x, layer + "input_layernorm"), cache)
            y = self._norm(x, layer + "post_attention_layernorm")
            x = x + self._mlp(f"{layer}mlp", y)
        x = self._norm(x, "model.norm")
        return (x @ self.weights["lm_head.weight"].T).log_softmax(-1)

    def _mlp(self, name: str, x: torch.Tensor) -> torch.Tensor:
        router = self.weights.get(f"{name}.gate.weight")
        if router is None:
            return self._network(name, x)
        probabilities = (x @ router.T).softmax(-1)
        weights, experts = probabilities.topk(self.config["num_experts_per_tok"], -1)
        weights = weights / weights.sum(-1, keepdim=True)
        out = torch.zeros_like(x)
        for token, choice in itertools.product(range(len(x)), range(experts.shape[1])):
            expert = f"{name}.experts.{int(experts[token, choice])}"
            row = self._network(expert, x[token : token + 1])[0]
            out[token] += weights[token, choice] * row
        return out

    def _network(self, name: str, x: torch.Tensor) -> torch.Tensor:
        gate, up = (x @ self.weights[f"{name}.{part}_proj.weight"].T for part in ("gate", "up"))
        return (torch.nn.functional.silu(gate) * up) @ self.weights[f"{name}.down_proj.weight"].T

    def keys_and_values(self, tokens: Sequence[int]) -> list[torch.Tensor]:
        """Return K and V of every layer, ``[2, tokens, kv_heads, head_dim]``, for calibration."""
        seen: list[torch.Tensor] = []

        class Spy(FakeCache):
            def __call__(self, rows: torch.Tensor, side: int) -> torch.Tensor:
                seen.append(rows)
                return rows

        self.logprobs(tokens, [Spy()] * self.layers)
        return [torch.stack(seen[2 * i : 2 * i + 2]) for i in range(self.layers)]

    def _norm(self, x: torch.Tensor, name: str) -> torch.Tensor:
        unit = x * (x.square().mean(-1, keepdim=True) + self.config["rms_norm_eps"]).rsqrt()
        return unit * self.weights[name + ".weight"]

    def _attention(self, layer: str, x: torch.Tensor, cache: FakeCache) -> torch.Tensor:
        query, key, value = (
            (x @ self.weights[f"{layer}self_attn.{p}_proj.weight"].T).unflatten(
                -1, (-1, self.head_dim)
            )
            for p in "qkv"
        )
        if f"{layer}self_attn.q_norm.weight" in self.weights:
            query = self._norm(query, f"{layer}self_attn.q_norm")
            key = self._norm(key, f"{layer}self_attn.k_norm")
        key, value = cache(self._rotate(key), 0), cache(value, 1)
        groups = query.shape[1] // self.kv_heads
        key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
        scores = torch.einsum("qhd,khd->hqk", self._rotate(query), key) * self.head_dim**-0.5
        distance = torch.arange(len(x))[:, None] - torch.arange(len(x))
        seen = (distance >= 0) & (distance < (self.config.get("sliding_window") or len(x)))
        weights = scores.masked_fill(~seen, -torch.inf).softmax(-1)
        out = torch.einsum("hqk,khd->qhd", weights, value).flatten(1)
        return out @ self.weights[f"{layer}self_attn.o_proj.weight"].T

    def _rotate(self, x: torch.Tensor) -> torch.Tensor:
        half = self.head_dim // 2
        theta = self.config["rope_theta"] ** (-torch.arange(half, dtype=torch.float64) / half)
        angle = (torch.arange(len(x))[:, None] * theta)[:, None]  # [tokens, 1, half]
        first, second = x[..., :half], x[..., half:]
        cos, sin = angle.cos(), angle.sin()
        return torch.cat((first * cos - second * sin, second * cos + first * sin), -1)


#: How far logprobs may lie apart: a hidden state that differs in the last bit of float32 turns a
#: few codes into their neighbours.
TOLERANCE = 0.015


def worst_difference(
    model: OfflineLlama, caches: Sequence[FakeCache], prompt: list[int], output: Output
) -> float:
    """Return how far the engine's logprobs are from the offline ones, tokens of a greedy choice.

    A token that the offline model likes less than another counts by how much less.
    """
    text = [*prompt, *output.tokens]
    ranked = model.logprobs(text, caches)[len(prompt) - 1 : -1]
    chosen = ranked[torch.arange(len(output.tokens)), output.tokens]
    off = (chosen - torch.tensor(output.logprobs, dtype=torch.float64)).abs()
    return float(torch.maximum(off, ranked.amax(-1) - chosen).max())
