"""A causal language model of transformers whose attention is routed to us."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import torch

from ascend_plugin.kv_cache import PageFormat
from ascend_plugin.kv_eval import routing
from ascend_plugin.kv_eval.errors import KVEvalError
from ascend_plugin.kv_eval.geometry import Geometry

#: Element types to compute in; ``auto`` is the checkpoint's own.
DTYPES = ("auto", "bfloat16", "float16", "float32")

_SAMPLES, _SAMPLE_BYTES = 64, 65536


class CausalModel:
    """A model and its tokenizer, ready to run.

    Attributes:
        name: of its folder.
        digest: identifies configuration, tokenizer and weights.
        tokenizer: of transformers.
        dtype: element type of activations.
        layers: shape of attention by index of the layer.
    """

    def __init__(self, path: Path, dtype: str) -> None:
        """Load a folder; nothing is downloaded.

        Raises:
            KVEvalError: it is no model that can be evaluated.
        """
        self.name = path.resolve().name
        self._model, self.tokenizer = load_causal_model(path, dtype)
        self.digest = model_digest(path)
        self.dtype: torch.dtype = self._model.dtype
        _route(self._model)
        self.layers = self._find_layers()

    def check_context(self, context: int) -> None:
        """Refuse windows that the model was not made for.

        Raises:
            KVEvalError: too long or too short.
        """
        check_context(self._model, self.name, context)

    def logits(self, ids: torch.Tensor, hook: routing.Hook) -> torch.Tensor:
        """Run one sequence.

        Args:
            ids: int64 ``[tokens]``.
            hook: computes attention.

        Returns:
            float32 ``[tokens, vocabulary]``; the last projection is computed in float32, whatever
            the model's type: bfloat16 logits are coarser than the differences to be measured.
        """
        with torch.no_grad(), routing.routed(hook):
            logits: torch.Tensor = self._model(input_ids=ids[None], use_cache=False).logits
        return logits[0].float()

    def _find_layers(self) -> dict[int, Geometry]:
        found: dict[int, Geometry] = {}

        def look(call: routing.LayerCall) -> torch.Tensor:
            heads, head_dim = call.query.shape[1:]
            if call.layer in found:
                raise KVEvalError(f"{self.name} has several attentions in layer {call.layer}.")
            _check_dims(call)
            found[call.layer] = Geometry(heads, call.key.shape[1], head_dim)
            return torch.zeros_like(call.query)

        self.logits(torch.tensor([0, 0]), look)
        if not found:
            raise KVEvalError(
                f"{self.name} ({type(self._model).__name__}) has no attention that goes through "
                "transformers' attention interface, so its KV cache cannot be replaced. Use a "
                "model that follows it, such as Llama, Qwen, Mistral or Gemma."
            )
        return dict(sorted(found.items()))


def check_context(model: Any, name: str, context: int) -> None:
    """Refuse windows that a model was not made for.

    Args:
        model: of transformers.
        name: of it, for the message.
        context: tokens of a window.

    Raises:
        KVEvalError: too long or too short.
    """
    longest = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if context < 2 or (longest is not None and context > longest):
        raise KVEvalError(
            f"--context {context} is not possible with {name}; allowed are 2 to "
            f"{longest or 'any number'}."
        )


def model_digest(path: Path) -> str:
    """Return a digest of a model's folder: small files whole, large ones in samples."""
    state = hashlib.sha256()
    for file in sorted(path.glob("*")):
        if file.suffix not in (".json", ".safetensors", ".bin", ".model") or not file.is_file():
            continue
        size = file.stat().st_size
        state.update(f"{file.name}\0{size}\0".encode())
        with file.open("rb") as stream:
            if size <= _SAMPLES * _SAMPLE_BYTES:
                state.update(stream.read())
                continue
            for i in range(_SAMPLES):
                stream.seek(i * (size - _SAMPLE_BYTES) // (_SAMPLES - 1))
                state.update(stream.read(_SAMPLE_BYTES))
    return state.hexdigest()


def load_causal_model(path: Path, dtype: str) -> tuple[Any, Any]:
    """Return model and tokenizer of a folder; the last projection computes in float32.

    Args:
        path: of a Hugging Face checkpoint.
        dtype: one of ``DTYPES``.

    Raises:
        KVEvalError: it is no model that can be evaluated.
    """
    if dtype not in DTYPES:
        raise KVEvalError(f"--dtype {dtype} is unknown; use one of {', '.join(DTYPES)}.")
    if not (path / "config.json").is_file():
        raise KVEvalError(
            f"{path} is not a model: it has no config.json. Give the folder of a Hugging Face "
            "checkpoint; 'ascend-plugin model smollm2 DIR' makes one."
        )
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    wanted = "auto" if dtype == "auto" else getattr(torch, dtype)
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, local_files_only=True)
        model = AutoModelForCausalLM.from_pretrained(path, dtype=wanted, local_files_only=True)
    except (OSError, ValueError, KeyError, ImportError, RuntimeError) as error:
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise KVEvalError(
            f"{path} cannot be loaded as a causal language model with a tokenizer: {reason}"
        ) from error
    widen_head(model)
    return model.eval(), tokenizer


def _route(model: Any) -> None:
    """Send a model's attention to us."""
    kinds = getattr(model.config.get_text_config(), "layer_types", None) or ()
    if "chunked_attention" in kinds:
        raise KVEvalError(
            f"{type(model).__name__} has layers with chunked attention, which the operators do "
            "not compute. Use a model with full or sliding-window attention."
        )
    routing.register()
    model.set_attn_implementation(routing.NAME)


def widen_head(model: Any) -> None:
    """Compute a model's last projection in float32."""
    head = model.get_output_embeddings()
    if head is None or not hasattr(head, "weight"):
        return
    # A new parameter: a head that is tied to the embedding must not widen that too.
    head.weight = torch.nn.Parameter(head.weight.detach().float(), requires_grad=False)
    if getattr(head, "bias", None) is not None:
        head.bias = torch.nn.Parameter(head.bias.detach().float(), requires_grad=False)
    head.register_forward_pre_hook(lambda _, args: (args[0].float(), *args[1:]))


def _check_dims(call: routing.LayerCall) -> None:
    head_dim, head_dim_v = call.query.shape[-1], call.value.shape[-1]
    if head_dim != head_dim_v:
        raise KVEvalError(
            f"layer {call.layer} has keys of {head_dim} and values of {head_dim_v} elements; "
            "pages hold K and V of equal head dimension, so this model cannot be evaluated."
        )
    try:
        PageFormat(torch.bfloat16, 128, call.key.shape[1], head_dim)
    except ValueError as error:
        raise KVEvalError(f"layer {call.layer}: {error}") from error
