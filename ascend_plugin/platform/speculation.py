"""What is checked and set for speculation when vLLM configures an engine."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ascend_plugin.config import ConfigError, SpeculationConfig
from ascend_plugin.metrics_folder import share_folder
from ascend_plugin.spec_decode.adaptive import SCHEDULER, why_fixed
from ascend_plugin.spec_decode.draft_head import find_order

if TYPE_CHECKING:
    from vllm.config import VllmConfig


def configure_speculation(
    vllm_config: VllmConfig, config: SpeculationConfig, adaptive: bool
) -> None:
    """Refuse what cannot be served, before a worker exists, and choose the scheduler.

    Args:
        vllm_config: of the engine.
        config: the settings.
        adaptive: whether the number of drafts is chosen where the settings do not say.

    Raises:
        ConfigError: settings without speculation, or that do not fit its method or model.
    """
    speculative = vllm_config.speculative_config
    if speculative is None:
        _refuse_idle_settings(config)
        return
    find_order(config.draft_head, speculative)
    fixed = why_fixed(vllm_config)
    if config.adaptive and fixed:
        raise ConfigError(f"speculation.adaptive=true cannot be served: {fixed}. Or leave it out.")
    if fixed or not (adaptive if config.adaptive is None else config.adaptive):
        return
    vllm_config.scheduler_config.scheduler_cls = SCHEDULER
    share_folder()
    from ascend_plugin.spec_decode.metrics import register_collector

    register_collector()


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
