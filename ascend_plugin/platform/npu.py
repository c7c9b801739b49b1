"""The platform of an Ascend NPU: what vLLM asks before a worker exists."""

from __future__ import annotations

import importlib
import logging
from typing import TYPE_CHECKING, Any

import torch
from vllm.platforms.interface import DeviceCapability, Platform, PlatformEnum
from vllm.v1.attention.backends.registry import AttentionBackendEnum

from ascend_plugin.config import ConfigError
from ascend_plugin.quantization import adopt as adopt_quantization

from .attention_choice import register_as_custom, why_not
from .common import LORA, configure
from .kv_cache import configure_kv_cache
from .npu_config import configure_engine
from .speculation import configure_speculation

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.config.kernel import IrOpPriorityConfig
    from vllm.utils.argparse_utils import FlexibleArgumentParser
    from vllm.v1.attention.backend import AttentionBackend
    from vllm.v1.attention.backends.mla.prefill.base import MLAPrefillBackend
    from vllm.v1.attention.backends.mla.prefill.selector import MLAPrefillSelectorConfig
    from vllm.v1.attention.selector import AttentionSelectorConfig

logger = logging.getLogger(__name__)

ATTENTION_BACKEND = "ascend_plugin.attention.npu.AscendNPUAttentionBackend"
MLA_BACKEND = "ascend_plugin.attention.mla_npu.AscendNPUMLABackend"
COMMUNICATOR = "ascend_plugin.worker.npu_communicator.AscendCommunicator"


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
    # Inductor has no code generator for NPUs here; graphs and fused operators do its work.
    simple_compile_backend = "eager"

    @property
    def supported_dtypes(self) -> list[torch.dtype]:
        """Types that the fused attention takes, preferred first."""
        return [torch.bfloat16, torch.float16]

    @classmethod
    def pre_register_and_update(cls, parser: FlexibleArgumentParser | None = None) -> None:
        """Make ``--attention-backend CUSTOM`` name the plugin's backend."""
        register_as_custom(ATTENTION_BACKEND)
        super().pre_register_and_update(parser)

    @classmethod
    def check_and_update_config(cls, vllm_config: VllmConfig) -> None:
        """Check the plugin's settings and choose its worker.

        Raises:
            ConfigError: settings that an NPU cannot serve.
        """
        config = configure(vllm_config, "npu")
        adopt_quantization(vllm_config, "npu")
        configure_kv_cache(vllm_config, config.kv_cache)
        configure_engine(vllm_config, config)
        # Whole steps run from graphs, which know one number of drafts.
        configure_speculation(vllm_config, config.speculation, adaptive=False)

    @classmethod
    def import_kernels(cls) -> None:
        """Import torch_npu, which registers its operators; vLLM has none for this device."""
        _npu()

    @classmethod
    def import_ir_kernels(cls) -> None:
        """Register the NPU's implementations of vLLM's IR operators beside vLLM's."""
        super().import_ir_kernels()
        from ascend_plugin.worker import npu_layers  # noqa: F401

    @classmethod
    def get_default_ir_op_priority(cls, vllm_config: VllmConfig) -> IrOpPriorityConfig:
        """Prefer fused norms; ``--ir-op-priority`` overrides."""
        from vllm.config.kernel import IrOpPriorityConfig

        from ascend_plugin.worker.npu_layers import PROVIDER

        order = [PROVIDER, "native"]
        return IrOpPriorityConfig.with_default(["native"], rms_norm=order, fused_add_rms_norm=order)

    @classmethod
    def register_triton_kernel_overrides(cls) -> None:
        """Replace the Triton kernels of the model runner, which have no Triton here."""
        from ascend_plugin.worker.npu_kernels import register

        register()

    @classmethod
    def get_attn_backend_cls(
        cls,
        selected_backend: AttentionBackendEnum | None,
        attn_selector_config: AttentionSelectorConfig,
        num_heads: int | None = None,
    ) -> str:
        """Return the plugin's backend.

        Raises:
            ConfigError: a layer that it does not serve; vLLM has no other for this device.
        """
        from ascend_plugin.attention.mla_npu import AscendNPUMLABackend
        from ascend_plugin.attention.npu import AscendNPUAttentionBackend

        mla = attn_selector_config.use_mla
        backend = AscendNPUMLABackend if mla else AscendNPUAttentionBackend
        reasons = why_not(backend, selected_backend, attn_selector_config)
        if reasons:
            sizes = "head dimensions 64 and 128"
            if mla:
                sizes = "latents of 512 with rotary parts of 64"
            raise ConfigError(
                f"attention of this model is not served on an NPU: {', '.join(reasons)}. The fused "
                f"operators take bfloat16 and float16, {sizes}, and blocks of 16 to 256 tokens in "
                "steps of 16. Set ASCEND_PLUGIN_DEVICE=cpu to serve on the CPU."
            )
        path = MLA_BACKEND if mla else ATTENTION_BACKEND
        register_as_custom(path)
        return path

    @classmethod
    def get_mla_prefill_backend_cls(
        cls, mla_selector_config: MLAPrefillSelectorConfig
    ) -> type[MLAPrefillBackend]:
        """Return what stands for prefill in MLA layers: it takes the path of decoding."""
        from ascend_plugin.attention.mla_npu import AbsorbedPrefill

        return AbsorbedPrefill

    @classmethod
    def _preferred_block_size_for_backends(
        cls,
        backend_classes: list[type[AttentionBackend]],
        default_block_size: int,
        vllm_config: VllmConfig,
    ) -> int:
        """Return the block size that all backends prefer, if they agree.

        vLLM asks only a backend that is alone. Layers of several variants of int8 pages, such as
        those of a draft, have several.
        """
        preferred = {each.get_preferred_block_size(default_block_size) for each in backend_classes}
        if len(preferred) == 1:
            return int(preferred.pop())
        size: int = super()._preferred_block_size_for_backends(
            backend_classes, default_block_size, vllm_config
        )
        return size

    @classmethod
    def get_device_communicator_cls(cls) -> str:
        """Return the communicator over hccl."""
        return COMMUNICATOR

    @classmethod
    def use_custom_op_collectives(cls) -> bool:
        """Collectives stay opaque operators under torch.compile."""
        return True

    @classmethod
    def get_punica_wrapper(cls) -> str:
        """Return the operators that LoRA layers call."""
        return LORA

    def is_sleep_mode_available(self) -> bool:
        """Return False, and say why: vLLM then refuses the engine.

        Sleeping takes an allocator that gives physical memory back and keeps addresses. vLLM's is
        written for CUDA's driver.
        """
        logger.warning(
            "--enable-sleep-mode is not served on an NPU: vLLM's allocator for it is CUDA's. Leave "
            "it out; to free the device, end the server, and start it again when it is needed."
        )
        return False

    @classmethod
    def get_static_graph_wrapper_cls(cls) -> str:
        """Return vLLM's wrapper, which captures with the graphs that the worker names."""
        return "vllm.compilation.cuda_graph.CUDAGraphWrapper"

    @classmethod
    def support_static_graph_mode(cls) -> bool:
        """Decode runs from captured graphs."""
        return True

    @classmethod
    def get_device_capability(cls, device_id: int = 0) -> DeviceCapability | None:
        """Return None: CUDA's compute capability has no meaning here."""
        return None

    @classmethod
    def get_device_name(cls, device_id: int = 0) -> str:
        """Return the chip's name, such as ``Ascend910B4``."""
        return str(_npu().get_device_name(device_id))

    @classmethod
    def get_device_uuid(cls, device_id: int = 0) -> str:
        """Return a name of the device that is the same in every process of this machine."""
        return f"npu-{cls.device_id_to_physical_device_id(device_id)}"

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
        """Refuse types that the fused attention does not take.

        Raises:
            ValueError: another type than bfloat16 or float16.
        """
        allowed = (torch.bfloat16, torch.float16)
        if dtype not in allowed:
            raise ValueError(
                f"{dtype} is not served on an NPU: its fused attention takes "
                f"{', '.join(map(str, allowed))}. Change --dtype."
            )

    @classmethod
    def is_pin_memory_available(cls) -> bool:
        """Pinned host memory is what asynchronous copies to the NPU need."""
        return True

    @classmethod
    def opaque_attention_op(cls) -> bool:
        """Attention stays one opaque operator under torch.compile.

        Otherwise Dynamo would trace it while there is no batch, and every answer would be silently
        computed with the zeros of the warm-up.
        """
        return True

    @classmethod
    def support_hybrid_kv_cache(cls) -> bool:
        """Layers with pages of different sizes may share one cache."""
        return True

    @classmethod
    def num_compute_units(cls, device_id: int = 0) -> int:
        """Return the number of AI cores (cube units)."""
        return int(getattr(_npu().get_device_properties(device_id), "cube_core_num", 0))
