"""What both platforms do when vLLM configures an engine."""

from __future__ import annotations

import logging
import os
from typing import TYPE_CHECKING

from ascend_plugin.config import ConfigError, PluginConfig, parse_config
from ascend_plugin.device import DEVICE_VARIABLE, DetectedDevice, detect_device
from ascend_plugin.log import share_vllm_handlers
from ascend_plugin.spec_decode.draft_layer import check_draft_layers
from ascend_plugin.versions import check_versions

if TYPE_CHECKING:
    from vllm.config import VllmConfig

logger = logging.getLogger(__name__)

#: Debug switch: start outside the tested set of versions.
SKIP_VERSIONS_VARIABLE = "ASCEND_PLUGIN_SKIP_VERSION_CHECK"

#: What LoRA layers call.
LORA = "ascend_plugin.worker.lora.MaskedPunicaWrapper"

_warned_broken = False


def configure(vllm_config: VllmConfig, kind: str) -> PluginConfig:
    """Check versions, settings and device before an engine starts.

    Args:
        vllm_config: the engine's configuration.
        kind: ``npu`` or ``cpu``, the platform that vLLM chose.

    Raises:
        ConfigError: settings that cannot be served on this platform, untested versions, or draft
            layers that do not fit their base.
    """
    share_vllm_handlers()
    refuse_untested_versions()
    config = parse_config(vllm_config.additional_config)
    detected = detect_device()
    if config.device not in ("auto", kind):
        raise ConfigError(_wrong_device(config.device, detected))
    if detected.broken:
        _warn_broken(detected)
    check_draft_layers(vllm_config)
    return config


def refuse_untested_versions() -> None:
    """Refuse versions of vLLM and torch outside the tested set.

    Raises:
        ConfigError: a version differs and the debug switch is not set.
    """
    problems = check_versions()
    if problems and os.environ.get(SKIP_VERSIONS_VARIABLE) != "1":
        sentences = " ".join(str(problem) for problem in problems)
        raise ConfigError(
            f"ascend-plugin runs with one tested set of versions. {sentences} "
            f"Set {SKIP_VERSIONS_VARIABLE}=1 to start all the same, untested."
        )


def _wrong_device(wanted: str, detected: DetectedDevice) -> str:
    if wanted == "npu":
        return (
            f"--additional-config asks for device 'npu', but {detected.reason}. Install torch-npu "
            "and CANN for this NPU, run 'ascend-plugin doctor', or use device 'auto'."
        )
    return (
        f"--additional-config asks for device 'cpu', but vLLM has already chosen the NPU "
        f"({detected.reason}). Set {DEVICE_VARIABLE}=cpu in the environment."
    )


def _warn_broken(detected: DetectedDevice) -> None:
    global _warned_broken
    if not _warned_broken:
        logger.warning(
            "Running on the CPU because %s. Run 'ascend-plugin doctor' for details.",
            detected.reason,
        )
        _warned_broken = True
