"""What is checked and set for speculation when vLLM configures an engine."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ascend_plugin.config import ConfigError, SpeculationConfig
from ascend_plugin.spec_decode.draft_head import find_order

if TYPE_CHECKING:
    from vllm.config import VllmConfig


def configure_speculation(vllm_config: VllmConfig, config: SpeculationConfig) -> None:
    """Refuse what cannot be served, before a worker exists.

    Raises:
        ConfigError: settings without speculation, or that do not fit its method or model.
    """
    speculative = vllm_config.speculative_config
    if speculative is None:
        _refuse_idle_settings(config)
        return
    find_order(config.draft_head, speculative)


def _refuse_idle_settings(config: SpeculationConfig) -> None:
    given = {
        "draft_head.tokens": config.draft_head.tokens or None,
        "draft_head.file": config.draft_head.file,
        "adaptive": config.adaptive or None,
    }
    told = ", ".join(f"speculation.{k}={v!r}" for k, v in given.items() if v is not None)
    if told:
        raise ConfigError(
            f"--additional-config sets {told}, but there is no speculation. Add "
            """--speculative-config '{"method": "mtp", "num_speculative_tokens": 2}', or leave """
            "them out."
        )
