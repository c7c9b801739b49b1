"""A tiny DeepSeek-V3 with a draft layer that is often right, and that layer in plain torch.

The layer is the base's last one, applied to the embedding of the next token; the base's first layer
is quiet, so that what enters its last one is close to that.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from offline_mtp import OfflineDrafts
from safetensors.torch import load_file, save_file
from tiny_deepseek import draw, make_model
from torch import nn

from ascend_plugin.mtp.layer import pass_mask

#: Of the base; the draft layer follows.
LAYERS = 2
#: Groups of experts, of which a token may use half; the correction of the choice is drawn.
GROUPS = {"n_routed_experts": 8, "n_group": 4, "topk_group": 2, "num_experts_per_tok": 2}
#: How loud embeddings are, and what the layers add to them, against a model without a draft layer.
_EMBEDDING, _LAYER = 1.7, 0.5
#: How much less the first layer adds than the last one.
_QUIET = 0.3
#: What a draft sees of the hidden state beside the embedding of the next token.
_HIDDEN_SHARE = 0.1


def write_deepseek_mtp(path: Path, **changes: Any) -> str:
    """Write a random float32 model with a draft layer, in DeepSeek-V3's layout; return its folder.

    Args:
        path: the folder.
        changes: settings of the Hugging Face configuration.
    """
    model = make_model("v3", {**GROUPS, **changes, "num_hidden_layers": LAYERS + 1})
    draw(model)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        _, last, draft = model.model.layers
        model.model.embed_tokens.weight *= _EMBEDDING
        for name, weight in model.named_parameters():
            if "o_proj" in name or "down_proj" in name:
                weight *= _LAYER * (_QUIET if "layers.0." in name else 1)
        last.mlp.gate.e_score_correction_bias.normal_(std=0.1, generator=generator)
        draft.load_state_dict(last.state_dict())
    model.save_pretrained(path)
    settings = json.loads((path / "config.json").read_text())
    settings |= {"num_hidden_layers": LAYERS, "num_nextn_predict_layers": 1}
    (path / "config.json").write_text(json.dumps(settings, indent=2))
    weights = load_file(path / "model.safetensors")
    save_file(weights | _own_tensors(weights), path / "model.safetensors", {"format": "pt"})
    return str(path)


def _own_tensors(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return what the draft layer has beside a decoder layer; embedding and head are copies."""
    norm = weights["model.norm.weight"]
    unit = torch.eye(len(norm))
    own = {
        "enorm.weight": torch.ones_like(norm),
        "hnorm.weight": torch.ones_like(norm),
        "eh_proj.weight": torch.cat([unit, _HIDDEN_SHARE * unit], 1),
        "shared_head.norm.weight": norm.clone(),
        "shared_head.head.weight": weights["lm_head.weight"].clone(),
        "embed_tokens.weight": weights["model.embed_tokens.weight"].clone(),
    }
    return {f"model.layers.{LAYERS}.{name}": weight for name, weight in own.items()}


class _Passes:
    """Latents of every pass so far, for the attention of transformers."""

    def __init__(self) -> None:
        self._kept: list[tuple[torch.Tensor, torch.Tensor]] = []

    def update(self, latent: torch.Tensor, rotary: torch.Tensor, layer: int) -> Sequence[Any]:
        """Return ``[1, 1, passes * tokens, width]`` of both."""
        self._kept.append((latent, rotary))
        return [torch.cat(parts, 2) for parts in zip(*self._kept, strict=True)]

    def __len__(self) -> int:
        return len(self._kept)


class OfflineDeepseekMTP(OfflineDrafts):
    """The draft layer of :func:`write_deepseek_mtp`.

    Source: ``vllm/model_executor/models/deepseek_mtp.py``. The hidden state comes after the final
    norm, and the layer's own after the norm of its head.
    """

    def __init__(self, path: str) -> None:
        super().__init__(path, num_hidden_layers=LAYERS + 1, attn_implementation="eager")
        config = self.base.config
        config.num_hidden_layers = LAYERS
        self.block = self.base.model.layers.pop(LAYERS)
        prefix = f"model.layers.{LAYERS}."
        weights = load_file(Path(path) / "model.safetensors")
        self.own = {
            name.removeprefix(prefix): weight
            for name, weight in weights.items()
            if name.startswith(prefix)
        }
        self.eps = config.rms_norm_eps

    def hidden(self, tokens: torch.Tensor) -> torch.Tensor:
        """Return the base's hidden states ``[1, tokens, hidden]`` after its final norm."""
        return self.base.model(input_ids=tokens, use_cache=False).last_hidden_state

    def run(self, hidden: torch.Tensor, embedding: torch.Tensor, passes: Any) -> torch.Tensor:
        """Return one pass of the layer."""
        embedding = torch.cat([torch.zeros_like(embedding[:, :1]), embedding[:, 1:]], 1)
        parts = [self._norm(embedding, "enorm"), self._norm(hidden, "hnorm")]
        x = nn.functional.linear(torch.cat(parts, -1), self.own["eh_proj.weight"])
        tokens = x.shape[1]
        seen = pass_mask(tokens, len(passes) + 1, x.device)[None, None]
        rope = self.base.model.rotary_emb(x, torch.arange(tokens)[None])
        mask = torch.zeros(seen.shape).masked_fill(~seen, -torch.inf)
        out = self.block(x, attention_mask=mask, position_embeddings=rope, past_key_values=passes)
        return self._norm(out, "shared_head.norm")

    def no_passes(self) -> _Passes:
        """Return what passes are kept in."""
        return _Passes()

    def _norm(self, x: torch.Tensor, name: str) -> torch.Tensor:
        weight = self.own[f"{name}.weight"]
        return nn.functional.rms_norm(x, weight.shape, weight, self.eps)
