"""The CPU fallback: vLLM's CPU platform with the plugin's attention over NZ pages."""

from __future__ import annotations

import logging
import os
from dataclasses import dataclass
from typing import TYPE_CHECKING

from vllm.platforms.cpu import CpuPlatform
from vllm.v1.attention.backends.registry import AttentionBackendEnum

from ascend_plugin.config import INT8_DTYPE, ConfigError
from ascend_plugin.quantization import adopt as adopt_quantization
from ascend_plugin.quantization import register as register_quantization
from ascend_plugin.worker.cpu_process import may_share

from .attention_choice import latents_refused, register_as_custom, why_not
from .common import LORA, configure
from .kv_cache import configure_kv_cache
from .speculation import configure_speculation

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.config.kernel import IrOpPriorityConfig
    from vllm.utils.argparse_utils import FlexibleArgumentParser
    from vllm.v1.attention.selector import AttentionSelectorConfig

logger = logging.getLogger(__name__)

ATTENTION_BACKEND = "ascend_plugin.attention.cpu.AscendCPUAttentionBackend"
MLA_BACKEND = "ascend_plugin.attention.mla_cpu.AscendCPUMLABackend"
WORKER = "ascend_plugin.worker.cpu.AscendCPUWorker"

#: What vLLM takes on a CPU for other models.
DEFAULT_BLOCK_SIZE = 128

#: Reasons already logged; a model asks once per layer.
_logged: set[str] = set()


class AscendCPUPlatform(CpuPlatform):
    """vLLM's CPU platform, serving attention from NZ pages.

    ``_enum`` stays ``CPU``: every table of vLLM that asks ``is_cpu()`` keeps working.
    """

    @classmethod
    def get_device_name(cls, device_id: int = 0) -> str:
        """Return the name under which the device is reported."""
        return "cpu (ascend-plugin)"

    @classmethod
    def pre_register_and_update(cls, parser: FlexibleArgumentParser | None = None) -> None:
        """Let ``--attention-backend CUSTOM`` and ``--quantization ascend`` name the plugin's."""
        register_as_custom(ATTENTION_BACKEND)
        register_quantization()
        super().pre_register_and_update(parser)

    @classmethod
    def apply_config_platform_defaults(cls, vllm_config: VllmConfig) -> None:
        """Leave models uncompiled unless it is asked for.

        Their decode steps are recorded and repeated without Python (``worker/cpu_steps.py``), which
        is faster than what Inductor makes of them and ready at once.
        """
        from vllm.config import CompilationMode

        super().apply_config_platform_defaults(vllm_config)
        if vllm_config.compilation_config.mode is None:
            vllm_config.compilation_config.mode = CompilationMode.NONE

    @classmethod
    def check_and_update_config(cls, vllm_config: VllmConfig) -> None:
        """Check the plugin's settings and choose its worker."""
        config = configure(vllm_config, "cpu")
        adopt_quantization(vllm_config, "cpu")
        configure_kv_cache(vllm_config, config.kv_cache)
        configure_speculation(vllm_config, config.speculation, adaptive=True)
        # The V2 runner exists only with a working Triton; a machine that has one must not
        # silently run code that the plugin was not tested with.
        os.environ.setdefault("VLLM_USE_V2_MODEL_RUNNER", "0")
        if vllm_config.parallel_config.worker_cls == "auto":
            vllm_config.parallel_config.worker_cls = WORKER
        # vLLM gives every model on a CPU a process of its own; ask before it decides.
        shares = may_share(vllm_config)
        model = vllm_config.model_config
        if model is not None and model.use_mla and not latents_refused(vllm_config):
            limits = LatentLimits.of(vllm_config)
            super().check_and_update_config(vllm_config)
            limits.restore(vllm_config)
        else:
            super().check_and_update_config(vllm_config)
        if shares:
            vllm_config.parallel_config.distributed_executor_backend = "uni"

    @classmethod
    def register_triton_kernel_overrides(cls) -> None:
        """Register vLLM's C++ replacements of Triton kernels, and ours for one that is wrong."""
        super().register_triton_kernel_overrides()
        from ascend_plugin.worker.torch_kernels import replace_on_cpus

        replace_on_cpus()

    @classmethod
    def import_ir_kernels(cls) -> None:
        """Register the plugin's implementations of vLLM's IR operators beside vLLM's."""
        super().import_ir_kernels()
        from . import cpu_norms  # noqa: F401

    @classmethod
    def get_default_ir_op_priority(cls, vllm_config: VllmConfig) -> IrOpPriorityConfig:
        """Prefer fused norms where nothing compiles the model; ``--ir-op-priority`` overrides."""
        from vllm.config import CompilationMode
        from vllm.config.kernel import IrOpPriorityConfig

        if vllm_config.compilation_config.mode != CompilationMode.NONE:
            return super().get_default_ir_op_priority(vllm_config)
        from .cpu_norms import PROVIDER

        ours = [PROVIDER, "native"]
        return IrOpPriorityConfig.with_default(["native"], rms_norm=ours, fused_add_rms_norm=ours)

    @classmethod
    def get_attn_backend_cls(
        cls,
        selected_backend: AttentionBackendEnum | None,
        attn_selector_config: AttentionSelectorConfig,
        num_heads: int | None = None,
    ) -> str:
        """Return the plugin's backend, or vLLM's own for what it does not serve."""
        from ascend_plugin.attention.cpu import AscendCPUAttentionBackend
        from ascend_plugin.attention.mla_cpu import AscendCPUMLABackend

        mla = attn_selector_config.use_mla
        backend = AscendCPUMLABackend if mla else AscendCPUAttentionBackend
        reasons = why_not(backend, selected_backend, attn_selector_config)
        if not reasons:
            path = MLA_BACKEND if mla else ATTENTION_BACKEND
            register_as_custom(path)
            return path
        if attn_selector_config.kv_cache_dtype == INT8_DTYPE:
            raise ConfigError(
                f"--kv-cache-dtype {INT8_DTYPE} is served by the plugin's attention alone, which "
                f"does not serve a layer of this model: {', '.join(reasons)}. Leave "
                "--kv-cache-dtype out."
            )
        _log_once(f"Attention falls to vLLM's own CPU backend: {', '.join(reasons)}.")
        if selected_backend == AttentionBackendEnum.CUSTOM:
            selected_backend = None
        return super().get_attn_backend_cls(selected_backend, attn_selector_config, num_heads)

    @classmethod
    def get_punica_wrapper(cls) -> str:
        """Return the plugin's operators for LoRA.

        vLLM's own for CPUs gives tokens without an adapter that of the last slot.
        """
        return LORA


@dataclass(frozen=True, slots=True)
class LatentLimits:
    """What vLLM takes from every MLA model on a CPU, because its own kernels need it so.

    They read blocks of 16 tokens, and no chunks and prefix hits. The plugin's do.
    """

    block_size: int
    prefix_caching: bool
    chunked_prefill: bool
    batched_tokens: int

    @classmethod
    def of(cls, vllm_config: VllmConfig) -> LatentLimits:
        """Return what an engine was configured with."""
        cache, scheduler = vllm_config.cache_config, vllm_config.scheduler_config
        return cls(
            cache.block_size if cache.user_specified_block_size else DEFAULT_BLOCK_SIZE,
            cache.enable_prefix_caching,
            scheduler.enable_chunked_prefill,
            scheduler.max_num_batched_tokens,
        )

    def restore(self, vllm_config: VllmConfig) -> None:
        """Undo vLLM's restrictions."""
        cache, scheduler = vllm_config.cache_config, vllm_config.scheduler_config
        cache.block_size = self.block_size
        cache.enable_prefix_caching = self.prefix_caching
        scheduler.enable_chunked_prefill = self.chunked_prefill
        scheduler.max_num_batched_tokens = self.batched_tokens
        logger.info(
            "Latent attention (MLA) runs over NZ pages: prefix caching is %s and chunked prefill "
            "%s, as configured.",
            *("on" if flag else "off" for flag in (self.prefix_caching, self.chunked_prefill)),
        )


def _log_once(message: str) -> None:
    if message not in _logged:
        _logged.add(message)
        logger.info(message)
