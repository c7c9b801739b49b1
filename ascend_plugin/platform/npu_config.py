"""What is checked and set when vLLM configures an engine for an NPU."""

from __future__ import annotations

import logging
import os
from typing import TYPE_CHECKING

import torch

from ascend_plugin.config import INT8_DTYPE, ConfigError, KVCacheConfig, PluginConfig
from ascend_plugin.device import DEVICE_VARIABLE
from ascend_plugin.ops import npu_latents
from ascend_plugin.ops.ascendc.library import why_missing
from ascend_plugin.ops.npu.ascendc import MAX_QUERY

if TYPE_CHECKING:
    from vllm.config import CompilationConfig, VllmConfig

logger = logging.getLogger(__name__)

WORKER = "ascend_plugin.worker.npu.AscendNPUWorker"


def configure_engine(vllm_config: VllmConfig, config: PluginConfig) -> None:
    """Refuse what an NPU cannot serve, before a worker exists, and set what it needs.

    Raises:
        ConfigError: a setting that an NPU cannot serve.
    """
    _refuse(vllm_config, config)
    # The V2 runner exists only with a working Triton; a machine that has one must not silently run
    # code that the plugin was not tested with.
    os.environ.setdefault("VLLM_USE_V2_MODEL_RUNNER", "0")
    # A forked process cannot use the driver that its parent has opened.
    os.environ["VLLM_WORKER_MULTIPROC_METHOD"] = "spawn"
    parallel = vllm_config.parallel_config
    if parallel.worker_cls == "auto":
        parallel.worker_cls = WORKER
    parallel.disable_custom_all_reduce = True
    _use_host_lengths(vllm_config)
    _configure_compilation(vllm_config.compilation_config)


def _refuse(vllm_config: VllmConfig, config: PluginConfig) -> None:
    _refuse_patches(config.kv_cache)
    _refuse_moving_scales(vllm_config, config.kv_cache)
    if config.ops.implementation != "auto":
        raise ConfigError(
            f"ops.implementation={config.ops.implementation!r} is for CPUs; the operators of an "
            "NPU have one implementation. Use 'auto'."
        )
    model = vllm_config.model_config
    if model is None:
        return
    if model.dtype == torch.float32:
        raise ConfigError(
            "dtype float32 is not served on an NPU: its fused attention takes bfloat16 and "
            f"float16. Set --dtype bfloat16, or {DEVICE_VARIABLE}=cpu to serve on the CPU."
        )
    _refuse_long_proposals(vllm_config)
    if model.use_mla:
        _refuse_latents(vllm_config)


def _refuse_latents(vllm_config: VllmConfig) -> None:
    """Refuse latent attention (MLA) that the fused operators do not compute."""
    model = vllm_config.model_config
    text = model.hf_text_config
    latent_dim, rotary_dim = (
        int(getattr(text, name, None) or 0) for name in ("kv_lora_rank", "qk_rope_head_dim")
    )
    heads = model.get_num_attention_heads(vllm_config.parallel_config)
    reasons = npu_latents.why_not(latent_dim, rotary_dim, heads)
    if getattr(text, "index_topk", None) is not None:
        reasons = ["attention to chosen tokens (sparse MLA)"]
    if vllm_config.kv_transfer_config is not None:
        reasons.append(
            "a KV connector, which moves a block as one piece of memory: latents and rotary parts "
            "lie apart (leave --kv-transfer-config out)"
        )
    if reasons:
        raise ConfigError(
            f"latent attention (MLA) of this model is not served on an NPU: {'; '.join(reasons)}. "
            f"Set {DEVICE_VARIABLE}=cpu to serve on the CPU."
        )


def _refuse_long_proposals(vllm_config: VllmConfig) -> None:
    """Refuse more drafts than a pass of the attention verifies."""
    speculative = vllm_config.speculative_config
    if speculative is None:
        return
    count, most = speculative.num_speculative_tokens, MAX_QUERY - 1
    if count is not None and count > most:
        raise ConfigError(
            f"num_speculative_tokens={count} is not served on an NPU: its attention verifies up to "
            f"{MAX_QUERY} tokens of a sequence at once. Allowed are 1 to {most}."
        )


def _refuse_patches(kv_cache: KVCacheConfig) -> None:
    if "c8p" not in {kv_cache.variant, *kv_cache.layers.values()}:
        return
    missing = why_missing()
    if missing:
        raise ConfigError(
            "kv_cache asks for c8p, and only AscendC kernels read its patches, which are missing: "
            f"{missing}. Or set kv_cache.variant to 'c8s' (static scales) or 'c8d' (computed as "
            "tokens are written)."
        )


def _refuse_moving_scales(vllm_config: VllmConfig, kv_cache: KVCacheConfig) -> None:
    """Refuse connectors where a block is more than one piece of memory."""
    int8 = vllm_config.cache_config.cache_dtype == INT8_DTYPE
    if vllm_config.kv_transfer_config is None or not int8:
        return
    variants = {kv_cache.variant, *kv_cache.layers.values()}
    if kv_cache.variant is None or variants & {"c8d", "c8p"}:
        raise ConfigError(
            "a KV connector moves a block as one piece of memory, and c8d keeps the scales of a "
            "block apart from its K and V on an NPU, as c8p does its patches. Set "
            "kv_cache.variant to 'c8s', or leave --kv-transfer-config or --kv-cache-dtype "
            f"{INT8_DTYPE} out."
        )


def _use_host_lengths(vllm_config: VllmConfig) -> None:
    """Keep exact lengths on the host, where the fused attention wants them.

    With drafts scheduled ahead of their verification, only the device would know how many were
    accepted, and every step would have to wait for it. The same holds for layers that draft: with
    rejected drafts as padding, the lengths of all drafts but the first would be too long.
    """
    speculative = vllm_config.speculative_config
    if speculative is None:
        return
    if vllm_config.scheduler_config.async_scheduling:
        logger.info("Asynchronous scheduling is switched off: speculation needs exact lengths.")
        vllm_config.scheduler_config.async_scheduling = False
    if speculative.use_eagle():  # MTP layers too
        speculative.disable_padded_drafter_batch = True


def _configure_compilation(compilation: CompilationConfig) -> None:
    if compilation.backend not in ("", "eager"):
        logger.info(
            "Compilation backend %r has no code generator for NPUs; 'eager' is used, which cuts "
            "the model into graphs.",
            compilation.backend,
        )
    compilation.backend = "eager"
    # Passes that fuse operators call kernels of other devices, and fail to import without them.
    for name, value in vars(compilation.pass_config).items():
        if value is True and name.startswith(("fuse_", "enable_")):
            setattr(compilation.pass_config, name, False)
