"""The base model: which ones a layer in MiMo's layout can serve, and what is read from them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ascend_plugin.mtp.errors import MTPError

#: Architectures whose weights vLLM's MiMo model reads as they are: Qwen2 without its name, Llama
#: and Mistral with a zero bias.
FAMILIES = ("llama", "mistral", "qwen2")


@dataclass(frozen=True, slots=True)
class LayerShape:
    """Sizes that a draft layer shares with its base.

    Attributes:
        hidden: width of hidden states.
        intermediate: width inside the MLP.
        heads, kv_heads, head_dim: of attention; ``heads * head_dim == hidden``.
        vocabulary: rows of the embedding.
        eps: of RMS norms.
    """

    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int
    eps: float


def read_config(path: Path) -> dict[str, Any]:
    """Return ``config.json`` of a model's folder.

    Raises:
        MTPError: there is none.
    """
    try:
        return dict(json.loads((path / "config.json").read_text(encoding="utf-8")))
    except (OSError, ValueError) as error:
        raise MTPError(
            f"{path} is not a model: its config.json cannot be read ({error}). Give the folder of "
            "a Hugging Face checkpoint; 'ascend-plugin model smollm2 DIR' makes one."
        ) from error


def check_base(config: Mapping[str, Any], path: Path) -> LayerShape:
    """Return the sizes of a base that MiMo's layout can express.

    Raises:
        MTPError: it cannot; the message says what is in the way.
    """
    family = config.get("model_type")
    if config.get("num_nextn_predict_layers"):
        raise MTPError(f"{path} has an MTP layer already. Give the model without one.")
    if family not in FAMILIES:
        raise MTPError(
            f"{path} is a {family!r} model; MiMo's layout holds dense models of the kinds "
            f"{', '.join(FAMILIES)}."
        )
    heads, hidden = int(config["num_attention_heads"]), int(config["hidden_size"])
    head_dim = int(config.get("head_dim") or hidden // heads)
    obstacles = {
        f"head_dim {head_dim} is not hidden_size / num_attention_heads": head_dim * heads != hidden,
        "attention_bias puts a bias on o_proj": bool(config.get("attention_bias"))
        and family != "qwen2",
        "mlp_bias": bool(config.get("mlp_bias")),
        "a sliding window": family != "qwen2" and config.get("sliding_window") is not None,
        "use_sliding_window": bool(config.get("use_sliding_window")),
        f"hidden_act {config.get('hidden_act')!r}": config.get("hidden_act", "silu") != "silu",
    }
    found = [reason for reason, present in obstacles.items() if present]
    if found:
        raise MTPError(f"{path} does not fit MiMo's layout: {'; '.join(found)}.")
    return LayerShape(
        hidden,
        int(config["intermediate_size"]),
        heads,
        int(config.get("num_key_value_heads") or heads),
        head_dim,
        int(config["vocab_size"]),
        float(config.get("rms_norm_eps", 1e-6)),
    )


def fingerprint(shape: LayerShape, last_norm: torch.Tensor, last_down: torch.Tensor) -> str:
    """Return what ties a draft layer to its base: sizes, and two weights that training changes."""
    state = hashlib.sha256(repr(shape).encode())
    for weight in (last_norm, last_down):
        state.update(weight.detach().bfloat16().contiguous().view(torch.int16).numpy().tobytes())
    return state.hexdigest()[:32]


class BaseModel:
    """A frozen model of transformers with what a draft layer needs of it.

    Attributes:
        path, shape, tokenizer: of the model.
        fingerprint: see :func:`fingerprint`.
    """

    def __init__(self, path: Path, device: str = "cpu") -> None:
        """Load a folder; nothing is downloaded.

        Raises:
            MTPError: it is no model that a draft layer can be trained for.
        """
        self.path = path
        self.shape = check_base(read_config(path), path)
        from transformers import AutoModelForCausalLM, AutoTokenizer
        from transformers.utils import logging

        logging.set_verbosity_error()
        logging.disable_progress_bar()
        try:
            self.tokenizer: Any = AutoTokenizer.from_pretrained(path, local_files_only=True)
            model = AutoModelForCausalLM.from_pretrained(
                path, dtype=torch.bfloat16, local_files_only=True
            )
        except (OSError, ValueError, KeyError, ImportError, RuntimeError) as error:
            reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
            raise MTPError(f"{path} cannot be loaded: {reason}") from error
        self._model: Any = model.eval().requires_grad_(False).to(device)
        self.device = torch.device(device)
        self._inner = self._model.model
        self.fingerprint = fingerprint(
            self.shape, self.norm.cpu(), self.last_layer.mlp.down_proj.weight.cpu()
        )

    @property
    def embedding(self) -> torch.Tensor:
        """Embedding of tokens, ``[vocabulary, hidden]``."""
        return self._inner.embed_tokens.weight

    @property
    def head(self) -> torch.Tensor:
        """Weight of the projection to logits, ``[vocabulary, hidden]``."""
        return self._model.lm_head.weight

    @property
    def norm(self) -> torch.Tensor:
        """Weight of the final norm, ``[hidden]``."""
        return self._inner.norm.weight

    @property
    def last_layer(self) -> Any:
        """The last decoder layer."""
        return self._inner.layers[-1]

    def rope(self, length: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return float32 cosines and sines ``[length, head_dim]`` of positions from 0."""
        positions = torch.arange(length, device=self.device)[None]
        cos, sin = self._inner.rotary_emb(self.norm.float(), positions)
        return cos[0].float(), sin[0].float()

    @torch.no_grad()
    def read(self, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Read sequences.

        Args:
            ids: int64 ``[sequences, tokens]``, padded on the right.

        Returns:
            Hidden states before and after the final norm, bfloat16 ``[sequences, tokens, hidden]``.
        """
        kept: list[torch.Tensor] = []
        hook = self._inner.norm.register_forward_pre_hook(lambda _, args: kept.append(args[0]))
        try:
            normed = self._inner(input_ids=ids.to(self.device), use_cache=False).last_hidden_state
        finally:
            hook.remove()
        return kept[0], normed
