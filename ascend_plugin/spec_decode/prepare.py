"""What is done to vLLM's proposer once its model is loaded."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ascend_plugin.config import SpeculationConfig

from .draft_head import shrink_draft_head

if TYPE_CHECKING:
    from vllm.config import VllmConfig


def prepare_drafter(vllm_config: VllmConfig, runner: Any, config: SpeculationConfig) -> None:
    """Apply the settings of speculation to the proposer of a model runner, if it has one.

    Raises:
        ConfigError: the draft model does not fit the settings.
    """
    if vllm_config.speculative_config is not None:
        shrink_draft_head(vllm_config, runner.drafter, config.draft_head)
