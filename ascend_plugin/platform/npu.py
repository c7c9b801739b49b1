"""The platform of an Ascend NPU: what vLLM asks before a worker exists.

The NPU's worker and operators are not part of this version: configuring an engine on it fails
with a sentence that says so.
"""

from __future__ import annotations

import importlib
import logging
from typing import TYPE_CHECKING, Any

import torch
from vllm.platforms.interface import DeviceCapability, Platform, PlatformEnum

from ascend_plugin.config import ConfigError
from ascend_plugin.device import DEVICE_VARIABLE

from .common import configure

if TYPE_CHECKING:
    from vllm.config import VllmConfig

logger = logging.getLogger(__name__)


def _npu() -> Any:
    """Return ``torch_npu.npu``; imported late because it initialises the driver."""
    return importlib.import_module("torch_npu").npu


class AscendNPUPlatform(Platform):
    """Device ``npu``, out of vLLM's tree."""

    _enum = PlatformEnum.OOT
    # vLLM builds torch.device(f"{device_name}:{i}") for platforms out of its tree.
    device_name = "npu"
    device_type = "npu"
    dispatch_key = "PrivateUse1"
    ray_device_key = "NPU"
    dist_backend = "hccl"
    device_control_env_var = "ASCEND_RT_VISIBLE_DEVICES"
    simple_compile_backend = "eager"

    @property
    def supported_dtypes(self) -> list[torch.dtype]:
        """Types the cube unit of the 910B multiplies, preferred first."""
        return [torch.bfloat16, torch.float16, torch.float32]

    @classmethod
    def check_and_update_config(cls, vllm_config: VllmConfig) -> None:
        """Refuse to start: this version has no worker for the NPU.

        Raises:
            ConfigError: always, after the plugin's own settings were checked.
        """
        configure(vllm_config, "npu")
        raise ConfigError(
            "ascend-plugin found an NPU, but this version has no NPU worker yet: it serves on "
            f"CPUs. Set {DEVICE_VARIABLE}=cpu in the environment to serve on this machine's CPU."
        )

    @classmethod
    def import_kernels(cls) -> None:
        """Import torch_npu, which registers its operators; vLLM has none for this device."""
        _npu()

    @classmethod
    def get_device_capability(cls, device_id: int = 0) -> DeviceCapability | None:
        """Return None: CUDA's compute capability has no meaning here."""
        return None

    @classmethod
    def get_device_name(cls, device_id: int = 0) -> str:
        """Return the chip's name, such as ``Ascend910B4``."""
        return str(_npu().get_device_name(device_id))

    @classmethod
    def get_device_total_memory(cls, device_id: int = 0) -> int:
        """Return the bytes of device memory."""
        return int(_npu().get_device_properties(device_id).total_memory)

    @classmethod
    def get_current_memory_usage(cls, device: torch.types.Device | None = None) -> float:
        """Return the peak bytes allocated since the last reset."""
        _npu().reset_peak_memory_stats(device)
        return float(_npu().max_memory_allocated(device))

    @classmethod
    def set_device(cls, device: torch.device) -> None:
        """Make ``device`` current in this process."""
        _npu().set_device(device)

    @classmethod
    def manual_seed_all(cls, seed: int) -> None:
        """Seed every NPU's generator."""
        _npu().manual_seed_all(seed)

    @classmethod
    def inference_mode(cls) -> Any:
        """Return the context in which models run."""
        return torch.inference_mode()

    @classmethod
    def check_if_supports_dtype(cls, dtype: torch.dtype) -> None:
        """Refuse types that the cube unit does not multiply.

        Raises:
            ValueError: another type than bfloat16, float16 or float32.
        """
        allowed = (torch.bfloat16, torch.float16, torch.float32)
        if dtype not in allowed:
            raise ValueError(
                f"{dtype} does not run on an NPU; allowed are {', '.join(map(str, allowed))}. "
                "Change --dtype."
            )

    @classmethod
    def is_pin_memory_available(cls) -> bool:
        """Pinned host memory is what asynchronous copies to the NPU need."""
        return True

    @classmethod
    def opaque_attention_op(cls) -> bool:
        """Attention stays one opaque operator under torch.compile."""
        return True

    @classmethod
    def support_hybrid_kv_cache(cls) -> bool:
        """Layers with pages of different sizes may share one cache."""
        return True

    @classmethod
    def num_compute_units(cls, device_id: int = 0) -> int:
        """Return the number of AI cores (cube units)."""
        return int(getattr(_npu().get_device_properties(device_id), "cube_core_num", 0))
