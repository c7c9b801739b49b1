"""What is done to vLLM's proposer once its model is loaded, and what came of it."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

from ascend_plugin.config import SpeculationConfig

from .adaptive import is_adaptive
from .draft_head import ends_of_text, find_order, shrink_draft_head
from .draft_keys import DeferredKeys, why_not
from .metrics import read_choices

if TYPE_CHECKING:
    import torch
    from vllm.config import VllmConfig

logger = logging.getLogger(__name__)


def prepare_drafter(vllm_config: VllmConfig, runner: Any, config: SpeculationConfig) -> None:
    """Apply the settings of speculation to the proposer of a model runner, if it has one.

    Raises:
        ConfigError: the draft model does not fit the settings.
    """
    speculative = vllm_config.speculative_config
    if speculative is None:
        return
    shrink_draft_head(vllm_config, runner.drafter, config.draft_head)
    if not is_adaptive(vllm_config):
        return
    sample_without_drafts(runner)
    obstacle = why_not(vllm_config, runner.drafter)
    if obstacle is None:
        assert speculative.num_speculative_tokens is not None
        runner.drafter.propose = DeferredKeys(runner, speculative.num_speculative_tokens)
    else:
        logger.info("The draft layer runs in steps without drafts too: %s.", obstacle)


def sample_without_drafts(runner: Any) -> None:
    """Let steps that verify nothing sample as engines without speculation do.

    vLLM sends them through its rejection sampler, which takes longer and says the same.

    Args:
        runner: vLLM's model runner.
    """
    sample = runner._sample

    def without(logits: torch.Tensor | None, metadata: Any) -> Any:
        verifies = metadata is not None and any(metadata.num_draft_tokens)
        return sample(logits, metadata if verifies else None)

    runner._sample = without


def describe(vllm_config: VllmConfig, config: SpeculationConfig) -> dict[str, object]:
    """Return how an engine drafts.

    Returns:
        ``adaptive``, whether the number of drafts is chosen while it runs; ``draft_head``, how many
        tokens drafts are chosen among, None for all; ``steps``, if it is chosen, how many steps
        made 0, 1, 2, ... drafts so far.
    """
    speculative = vllm_config.speculative_config
    if speculative is None:
        return {}
    order = find_order(config.draft_head, speculative)
    ends = ends_of_text(speculative.target_model_config)
    found: dict[str, object] = {
        "adaptive": is_adaptive(vllm_config),
        "draft_head": None if order is None else len(order.kept(config.draft_head.tokens, ends)),
    }
    choices = read_choices()
    return found | ({"steps": list(choices[-1].steps)} if choices else {})
