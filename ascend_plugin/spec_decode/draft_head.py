"""A draft head over frequent tokens: fewer rows of the projection to logits, for drafts alone.

For a small model the projection of a draft costs more than the layer that drafts. Tokens that are
left out have the logit minus infinity, so they are never drafted; verification sees the whole
vocabulary as before, so what is generated does not change.

Source of the idea: FR-Spec (https://arxiv.org/abs/2502.14856).
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ascend_plugin.config import ConfigError, DraftHeadConfig

from .token_order import FILE, TokenOrder, load_order

if TYPE_CHECKING:
    from vllm.config import ModelConfig, SpeculativeConfig, VllmConfig
    from vllm.model_executor.layers.logits_processor import LogitsProcessor

logger = logging.getLogger(__name__)

#: Methods whose drafts come from one projection to the target's vocabulary.
METHODS = ("mtp", "eagle", "draft_model")


def find_order(config: DraftHeadConfig, speculative: SpeculativeConfig) -> TokenOrder | None:
    """Return the order of tokens that the settings or the checkpoint name; None: keep all.

    Raises:
        ConfigError: a head is asked for and there is no order, or it is not this model's, or the
            method has no head.
    """
    if config.tokens == 0:
        return None
    asked = config.tokens is not None or config.file is not None
    if speculative.method not in METHODS or speculative.use_heterogeneous_vocab:
        if asked:
            raise ConfigError(
                f"speculation.draft_head serves the methods {', '.join(METHODS)} over the target's "
                f"own vocabulary, and --speculative-config has method {speculative.method!r}"
                f"{' with a vocabulary of its own' * speculative.use_heterogeneous_vocab}. Leave "
                "it out."
            )
        return None
    target, folder = speculative.target_model_config, speculative.draft_model_config.model
    path = Path(config.file) if config.file else Path(folder) / FILE
    if not asked and not path.is_file():
        return None
    if config.file is None and not path.is_file():
        raise ConfigError(
            f"speculation.draft_head.tokens={config.tokens} is given, but {folder} does not "
            "say which tokens are frequent. Make a file with 'ascend-plugin mtp head MODEL --text "
            "FILE -o FILE' and name it in speculation.draft_head.file."
        )
    order = load_order(path)
    order.check_vocabulary(target.get_vocab_size(), path)
    order.kept(config.tokens, ends_of_text(target))
    return order


def ends_of_text(model: ModelConfig) -> set[int]:
    """Return the tokens that end a text, as the model's files name them."""
    given = [
        getattr(model.hf_config, "eos_token_id", None),
        model.try_get_generation_config().get("eos_token_id"),
    ]
    return {
        int(token)
        for ids in given
        if ids is not None
        for token in (ids if isinstance(ids, list) else [ids])
    }


def shrink_draft_head(vllm_config: VllmConfig, drafter: Any, config: DraftHeadConfig) -> None:
    """Let a loaded proposer draft among frequent tokens, as configured.

    Args:
        vllm_config: of the engine.
        drafter: vLLM's proposer, whose ``model`` is loaded.
        config: the settings.

    Raises:
        ConfigError: a head is asked for that the draft model cannot have.
    """
    speculative = vllm_config.speculative_config
    order = None if speculative is None else find_order(config, speculative)
    if speculative is None or order is None:
        return
    kept = order.kept(config.tokens, ends_of_text(speculative.target_model_config))
    try:
        head = DraftHead(drafter.model, kept.to(drafter.device))
        head.prepare(drafter.hidden_size, drafter.dtype)
    except HeadError as error:
        if config.tokens is not None or config.file is not None:
            raise ConfigError(
                f"speculation.draft_head does not serve this model: {error}. Leave it out."
            ) from error
        logger.info("Drafts are chosen among the whole vocabulary: %s.", error)
        return
    drafter.model.get_top_tokens = head.top_tokens
    drafter.use_local_argmax_reduction = True  # its name for "ask get_top_tokens"
    logger.info(
        "Drafts are chosen among %d of %d tokens; those that are verified see all.",
        len(kept),
        order.vocabulary,
    )


class HeadError(ValueError):
    """A draft model has no projection of which rows can be taken; the message says why."""


class _Rows(nn.Module):
    """Rows of a projection, shaped like vLLM's head; every worker has all of them."""

    def __init__(self, weight: torch.Tensor) -> None:
        from vllm.model_executor.layers.vocab_parallel_embedding import UnquantizedEmbeddingMethod

        super().__init__()
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.tp_size = 1
        self.quant_method = UnquantizedEmbeddingMethod()
        self.quant_method.process_weights_after_loading(self)


class DraftHead:
    """The projection of a draft model over kept tokens.

    Its ``LogitsProcessor`` is what is replaced: norms before it and the choice among several heads
    are the model's own.
    """

    def __init__(self, model: nn.Module, tokens: torch.Tensor) -> None:
        """Take the place of the model's projection.

        Args:
            model: any of vLLM's models with ``compute_logits``.
            tokens: kept ones, int64 ``[kept]``, ascending, on the model's device.

        Raises:
            HeadError: the model has no single projection over its vocabulary.
        """
        from vllm.model_executor.layers.logits_processor import LogitsProcessor

        found = [module for module in model.modules() if isinstance(module, LogitsProcessor)]
        if len(found) != 1:
            raise HeadError(f"{type(model).__name__} has {len(found)} layers that make logits")
        self._model, self._tokens = model, tokens
        self._processor: LogitsProcessor = found[0]
        self._whole = self._processor.forward
        self._rows: dict[int, _Rows] = {}
        self._compact = False

    def prepare(self, hidden_size: int, dtype: torch.dtype) -> None:
        """Copy the rows that are kept, now, not at the first draft.

        Raises:
            HeadError: the projection is quantised, biased, or not over the target's vocabulary.
        """
        self._processor.forward = self._forward
        try:
            with torch.inference_mode():
                probe = torch.zeros(1, hidden_size, dtype=dtype, device=self._tokens.device)
                self.top_tokens(probe)
        except HeadError:
            self._processor.forward = self._whole
            raise

    def top_tokens(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Return the most likely token of each row.

        Args:
            hidden_states: ``[rows, hidden]``.

        Returns:
            int64 ``[rows]``.
        """
        self._compact = True
        try:
            compute: Any = self._model.compute_logits
            logits = compute(hidden_states)  # [rows, kept]
        finally:
            self._compact = False
        return self._tokens[logits.argmax(-1)]

    def _forward(
        self,
        lm_head: Any,
        hidden_states: torch.Tensor,
        embedding_bias: torch.Tensor | None = None,
        skip_gather: bool = False,
    ) -> torch.Tensor:
        """Stand in for ``LogitsProcessor.forward``.

        Returns:
            Logits ``[rows, vocabulary]``, minus infinity for tokens that are left out; within
            ``top_tokens`` those of kept ones alone.
        """
        if embedding_bias is not None:
            raise HeadError("its logits have a bias")
        if id(lm_head) not in self._rows:
            self._rows[id(lm_head)] = _Rows(self._take(lm_head))
        logits = self._whole(self._rows[id(lm_head)], hidden_states)  # [rows, kept]
        if self._compact:
            return logits
        full = logits.new_full((*logits.shape[:-1], self._processor.org_vocab_size), -torch.inf)
        return full.index_copy_(-1, self._tokens, logits)

    def _take(self, lm_head: Any) -> torch.Tensor:
        """Return the kept rows ``[kept, hidden]`` of a head that workers may share."""
        from vllm.distributed import tensor_model_parallel_all_reduce
        from vllm.model_executor.layers.linear import UnquantizedLinearMethod
        from vllm.model_executor.layers.vocab_parallel_embedding import UnquantizedEmbeddingMethod

        lm_head = getattr(lm_head, "base_layer", lm_head)  # drafts know no LoRA
        plain = (UnquantizedEmbeddingMethod, UnquantizedLinearMethod)
        if not isinstance(lm_head.quant_method, plain):
            raise HeadError(f"its head is quantised ({type(lm_head.quant_method).__name__})")
        weight, shard = lm_head.weight, lm_head.shard_indices
        if int(self._tokens[-1]) >= self._processor.org_vocab_size:
            raise HeadError(f"its head has {self._processor.org_vocab_size} tokens")
        first, end = shard.org_vocab_start_index, shard.org_vocab_end_index
        own = (self._tokens >= first) & (self._tokens < end)
        rows = weight.new_zeros(len(self._tokens), weight.shape[1])
        rows[own] = weight.detach()[self._tokens[own] - first]
        return tensor_model_parallel_all_reduce(rows) if lm_head.tp_size > 1 else rows
