"""What a draft layer must draft, in plain torch: the engine's acceptance has to be exactly this.

Speculation is lossless, so a wrong key or position of a draft never shows in the tokens; it shows
in how many drafts are accepted.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path
from typing import Any

import torch
from implementations import threads
from safetensors.torch import load_file

from ascend_plugin.mtp.base import LayerShape
from ascend_plugin.mtp.layer import PREFIX, Keys, MTPLayer, shift


@dataclass(frozen=True, slots=True)
class Counts:
    """How a request went: proposals that were verified, and accepted drafts by place."""

    proposals: int
    accepted: tuple[int, ...]

    def __add__(self, other: Counts) -> Counts:
        places = zip(self.accepted, other.accepted, strict=True)
        return Counts(self.proposals + other.proposals, tuple(a + b for a, b in places))


class OfflineDrafts(ABC):
    """A base model of transformers and its draft layer, in float32."""

    def __init__(self, path: str, kept: torch.Tensor | None = None, **options: Any) -> None:
        """Load a checkpoint; drafts are among ``kept`` tokens, or all."""
        from transformers import AutoModelForCausalLM

        self.base = AutoModelForCausalLM.from_pretrained(
            path, dtype=torch.float32, **options
        ).eval()
        self._left_out = torch.zeros(self.base.config.vocab_size, dtype=torch.bool)
        if kept is not None:
            self._left_out[:] = True
            self._left_out[kept] = False

    @abstractmethod
    def hidden(self, tokens: torch.Tensor) -> torch.Tensor:
        """Return what the layer is given of the base, ``[1, tokens, hidden]``."""

    @abstractmethod
    def no_passes(self) -> Any:
        """Return what keeps the keys of passes."""

    @abstractmethod
    def run(self, hidden: torch.Tensor, embedding: torch.Tensor, passes: Any) -> torch.Tensor:
        """Run a pass over ``[1, tokens, hidden]``; what it returns goes into the base's head."""

    @torch.no_grad()
    def logits(self, tokens: torch.Tensor) -> torch.Tensor:
        """Return the base's logits ``[batch, tokens, vocabulary]``."""
        return self.base(input_ids=tokens, use_cache=False).logits

    @torch.no_grad()
    def drafts(self, text: list[int], count: int) -> torch.Tensor:
        """Return the draft ``[count, tokens - 1]`` of each pass at each position.

        Position p of pass s drafts token p + 2, in a chain that began s positions earlier and was
        right so far.
        """
        hidden = self.hidden(torch.tensor([text]))[:, :-1]
        embedding = self.base.model.embed_tokens(torch.tensor([text[1:]]))
        passes = self.no_passes()
        found = []
        for _ in range(count):
            output = self.run(hidden, embedding, passes)
            logits = self.base.lm_head(output)[0]
            found.append(logits.masked_fill(self._left_out, -torch.inf).argmax(-1))
            hidden = shift(output)
        return torch.stack(found)

    def walk(
        self, prompt: list[int], text: list[int], tokens: int, script: Sequence[int]
    ) -> Counts:
        """Speculate greedily: verify proposals until so many tokens are generated.

        Args:
            prompt: what the engine was given.
            text: the prompt and the base's greedy continuation, at least ``drafts`` tokens longer
                than what is generated.
            tokens: to generate.
            script: drafts of one proposal after the other, again and again; 0 makes none.
        """
        drafts = max(script)
        with threads(1):
            proposed = self.drafts(text, drafts)
        known = len(prompt) + 1
        proposals, accepted, wanted = 0, [0] * drafts, cycle(script)
        while known - len(prompt) < tokens:
            count, right = next(wanted), 0
            proposals += count > 0
            while right < count and proposed[right, known - 2 + right] == text[known + right]:
                accepted[right] += 1
                right += 1
            known += right + 1
        return Counts(proposals, tuple(accepted))


class OfflineMTP(OfflineDrafts):
    """A model in MiMo's layout; its layer is the plugin's own, which the training uses."""

    def __init__(self, path: str, kept: torch.Tensor | None = None) -> None:
        super().__init__(path, kept)
        config = self.base.config
        heads, hidden = config.num_attention_heads, config.hidden_size
        self.layer = MTPLayer(
            LayerShape(
                hidden,
                config.intermediate_size,
                heads,
                config.num_key_value_heads,
                hidden // heads,
                config.vocab_size,
                config.rms_norm_eps,
            )
        )
        weights: dict[str, torch.Tensor] = {}
        for file in Path(path).glob("*.safetensors"):
            weights |= load_file(file)
        self.layer.load_state_dict(
            {k.removeprefix(PREFIX): v.float() for k, v in weights.items() if k.startswith(PREFIX)}
        )

    def hidden(self, tokens: torch.Tensor) -> torch.Tensor:
        """Return the base's hidden states before its final norm."""
        kept: list[torch.Tensor] = []
        inner = self.base.model
        hook = inner.norm.register_forward_pre_hook(lambda _, args: kept.append(args[0]))
        inner(input_ids=tokens, use_cache=False)
        hook.remove()
        return kept[0]

    def no_passes(self) -> list[Keys]:
        """Return what keeps the keys of passes."""
        return []

    def run(
        self, hidden: torch.Tensor, embedding: torch.Tensor, passes: list[Keys]
    ) -> torch.Tensor:
        """Run a pass."""
        positions = torch.arange(hidden.shape[1])[None]
        cos, sin = self.base.model.rotary_emb(hidden, positions)
        return self.layer(hidden, embedding, (cos[0], sin[0]), passes)
