"""Patches of vLLM 0.32.0. Each is idempotent and says why it exists and when it can go."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

_MARK = "_ascend_plugin_patch"


def apply_patches() -> None:
    """Apply every patch; safe to call more than once and in every process."""
    _refuse_out_of_vocabulary_prompts()


def _refuse_out_of_vocabulary_prompts() -> None:
    """Refuse prompt ids beyond the model's vocabulary as a request error.

    Why: ``BaseRenderer.validate_token_ids`` checks nothing without a tokenizer
    (``skip_tokenizer_init``), and with one it allows the larger of the tokenizer's and the model's
    vocabulary. An id beyond the embedding table then kills the worker, and with it every other
    request.
    Remove when: vLLM checks ids against the model's embedding table by itself.
    """
    from vllm.exceptions import VLLMValidationError
    from vllm.renderers.base import BaseRenderer

    original: Callable[..., None] = BaseRenderer.validate_token_ids
    if getattr(original, _MARK, False):
        return

    @functools.wraps(original)
    def validate_token_ids(
        self: Any, token_ids: Sequence[int], *, parameter: str | None = None
    ) -> None:
        original(self, token_ids, parameter=parameter)
        # Multimodal models use placeholder ids outside the vocabulary that are never embedded.
        if not token_ids or self.model_config.is_multimodal_model:
            return
        vocabulary = self.model_config.get_vocab_size()
        worst = next((t for t in (min(token_ids), max(token_ids)) if not 0 <= t < vocabulary), None)
        if worst is not None:
            raise VLLMValidationError(
                f"Token id {worst} is out of vocabulary: the model has ids 0 to "
                f"{vocabulary - 1}. Tokenize the prompt with the model's own tokenizer.",
                parameter=parameter or "prompt_token_ids",
                value=worst,
            )

    setattr(validate_token_ids, _MARK, True)
    BaseRenderer.validate_token_ids = validate_token_ids
