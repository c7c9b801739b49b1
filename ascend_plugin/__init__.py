"""vLLM platform plugin for Huawei Ascend NPUs, with a fast CPU fallback.

vLLM loads this module in every process while its own platform is still being resolved, so it
imports nothing heavy: not vLLM, not torch, not torch_npu.
"""

from __future__ import annotations


def register_platform() -> str:
    """Entry point ``vllm.platform_plugins``: name the platform class of this machine.

    vLLM swallows exceptions raised here and goes on with its own CPU platform, so nothing may
    fail: what is wrong is kept and told when the engine is configured.

    Returns:
        Qualified name of a ``vllm.platforms.Platform`` subclass.
    """
    from .device import detect_device

    if detect_device().kind == "npu":
        return "ascend_plugin.platform.npu.AscendNPUPlatform"
    return "ascend_plugin.platform.cpu.AscendCPUPlatform"


def register_general() -> None:
    """Entry point ``vllm.general_plugins``: run once or more in every process of vLLM."""
    from .compat import apply_patches
    from .log import share_vllm_handlers
    from .quantization import register

    share_vllm_handlers()
    apply_patches()
    register()


__all__ = ["register_general", "register_platform"]
