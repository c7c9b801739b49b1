"""SmolLM2 as real tools quantised it (``make checkpoints``), and what it should answer."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from offline_llama import FakeCache
from quant_oracle import read_meaning
from transformers import AutoTokenizer, DynamicCache, LlamaConfig, LlamaForCausalLM

MODELS = Path(__file__).resolve().parents[2] / "models"
MADE = sorted(path.parent for path in (MODELS / "quantised").glob("*/config.json"))
NONE_MADE = "no checkpoints in models/quantised; run: make checkpoints"


def question() -> list[int]:
    """Return a question about France as tokens."""
    turns = [{"role": "user", "content": "What is the capital of France?"}]
    found = _tokenizer().apply_chat_template(turns, add_generation_prompt=True, return_dict=False)
    return list(found)


def text(tokens: list[int]) -> str:
    """Return what tokens say."""
    return str(_tokenizer().decode(tokens))


def _tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(MODELS / "smollm2")


class QuantisedPages(DynamicCache):
    """Keys and values as static int8 leaves them.

    Args:
        scales: by layer, ``[2, kv_heads, head_dim]``.
    """

    def __init__(self, scales: dict[int, torch.Tensor]) -> None:
        super().__init__()
        self._scales = scales

    def update(
        self, keys: torch.Tensor, values: torch.Tensor, layer: int, *rest: Any, **named: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Round what is added, ``[1, kv_heads, tokens, head_dim]``."""
        fake = FakeCache("c8s", self._scales[layer])
        added = [
            fake(rows[0].transpose(0, 1), side).float().transpose(0, 1)[None]
            for side, rows in enumerate((keys, values))
        ]
        return super().update(*added, layer, *rest, **named)


class SmolLM2Oracle:
    """transformers with the weights that the oracle reads, and inputs quantised by it.

    Args:
        folder: the checkpoint.
        tokens: a prompt and its answer.
        answered: how many of them are the answer.
    """

    def __init__(self, folder: Path, tokens: list[int], answered: int) -> None:
        meant = read_meaning(folder)
        config = json.loads((folder / "config.json").read_text())
        config.pop("quantization_config", None)
        self._model = LlamaForCausalLM(LlamaConfig(**config)).float().eval()
        weights = {name: weight.float() for name, weight in meant.weights.items()}
        missing, unexpected = self._model.load_state_dict(weights, strict=False)
        assert not unexpected
        assert set(missing) <= {"lm_head.weight"}
        self._model.tie_weights()
        for module, fake in meant.fakes.items():
            self._model.get_submodule(module).register_forward_pre_hook(
                lambda _, args, fake=fake: (fake(args[0]).float(), *args[1:])
            )
        self._tokens = torch.tensor(tokens)
        self._answered = answered
        self._kv_scales = meant.kv_scales
        self.quantises_keys = bool(meant.kv_scales)
        self.quantises_inputs = bool(meant.fakes) or self.quantises_keys

    @torch.no_grad()
    def logprobs(self, noise: float = 0.0, seed: int = 0) -> torch.Tensor:
        """Return the logprobs of the answer's tokens, of embeddings with relative noise."""
        embeddings = self._model.get_input_embeddings()(self._tokens)
        if noise:
            generator = torch.Generator().manual_seed(seed)
            embeddings *= 1 + noise * torch.randn(embeddings.shape, generator=generator)
        pages = QuantisedPages(self._kv_scales) if self._kv_scales else None
        found = self._model(inputs_embeds=embeddings[None], past_key_values=pages)
        logits = found.logits[0]
        at = logits[-self._answered - 1 : -1].log_softmax(-1)
        return at.gather(-1, self._tokens[-self._answered :, None]).squeeze(-1)

    def spread(self, noise: float) -> float:
        """Return by how much logprobs change on average where a little noise changes them most.

        Codes of inputs turn a sum's last bits into a step of 1/127, and that into others: after 30
        layers two right answers are that far apart.
        """
        plain = self.logprobs()
        return max(float((self.logprobs(noise, seed) - plain).abs().mean()) for seed in range(5))
