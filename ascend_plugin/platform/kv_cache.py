"""What is checked and set up for an int8 KV cache when vLLM configures an engine."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from vllm.v1.attention.backends.registry import AttentionBackendEnum

from ascend_plugin.attention.latent_quantisation import refuse_settings
from ascend_plugin.config import INT8_DTYPE, ConfigError, KVCacheConfig
from ascend_plugin.kv_cache.checkpoint import is_int8_scheme
from ascend_plugin.kv_cache.scales import check_layers, load_kv_scales
from ascend_plugin.kv_cache.variants import LayerPatternError, check_patterns
from ascend_plugin.metrics_folder import share_folder

if TYPE_CHECKING:
    from vllm.config import ModelConfig, VllmConfig

logger = logging.getLogger(__name__)


def configure_kv_cache(vllm_config: VllmConfig, config: KVCacheConfig) -> None:
    """Refuse what cannot be served, before a worker exists, and prepare the counters.

    What needs the model's layers is checked when they are there, in
    ``ascend_plugin.attention.kv_quantisation``.

    Raises:
        ConfigError: settings that exclude each other or do not fit the model.
        KVScalesError: the file of scales cannot be used.
    """
    _adopt_int8_scheme(vllm_config)
    if vllm_config.cache_config.cache_dtype != INT8_DTYPE:
        _refuse_int8_settings(config, vllm_config.cache_config.cache_dtype)
        return
    backend = vllm_config.attention_config.backend
    if backend not in (None, AttentionBackendEnum.CUSTOM):
        raise ConfigError(
            f"--kv-cache-dtype {INT8_DTYPE} is served by the plugin's attention alone, and "
            f"--attention-backend {backend.name} was asked for. Leave one of them out."
        )
    model = vllm_config.model_config
    if model is not None and model.use_mla:
        refuse_settings(config)
    elif model is not None and not _is_draft(vllm_config):
        _check_model(model, config, vllm_config.parallel_config.tensor_parallel_size)
    share_folder()
    from ascend_plugin.kv_cache.metrics import register_collector

    register_collector()


def _is_draft(vllm_config: VllmConfig) -> bool:
    """Say whether this is vLLM's configuration of a draft, which has no scales of its own."""
    speculative = vllm_config.speculative_config
    return speculative is not None and speculative.draft_model_config is vllm_config.model_config


def _adopt_int8_scheme(vllm_config: VllmConfig) -> None:
    """Make the KV cache int8 where the checkpoint says so and the user nothing.

    Of compressed-tensors vLLM knows only fp8 and stops at any other ``kv_cache_scheme``: it is
    taken out of vLLM's configuration.
    """
    if not _says_int8(vllm_config):
        return
    if hasattr(vllm_config.quant_config, "kv_cache_scheme"):
        vllm_config.quant_config.kv_cache_scheme = None
    if vllm_config.cache_config.cache_dtype == "auto":
        vllm_config.cache_config.cache_dtype = INT8_DTYPE
        logger.info(
            "The KV cache is int8, as the checkpoint says; --kv-cache-dtype bfloat16 leaves it "
            "unquantised."
        )


def _says_int8(vllm_config: VllmConfig) -> bool:
    """Say whether a checkpoint asks for an int8 cache of all layers: ModelSlim's by its scales."""
    quant_config, model = vllm_config.quant_config, vllm_config.model_config
    if model is None:
        return False
    if getattr(quant_config, "kv_cache_scheme", None) is not None:
        return is_int8_scheme(getattr(model.hf_config, "quantization_config", None))
    kv = getattr(getattr(quant_config, "checkpoint", None), "kv", None)
    return kv is not None and (kv.kind, kv.layers) == ("C8", model.get_total_num_hidden_layers())


def _refuse_int8_settings(config: KVCacheConfig, cache_dtype: str) -> None:
    given = config.int8_settings()
    if given:
        told = ", ".join(f"kv_cache.{name}={value!r}" for name, value in given.items())
        raise ConfigError(
            f"--additional-config sets {told}, but --kv-cache-dtype is {cache_dtype!r}: these "
            f"settings are for int8 caches. Add --kv-cache-dtype {INT8_DTYPE}, or leave them out."
        )


def _check_model(model: ModelConfig, config: KVCacheConfig, world: int) -> None:
    try:
        check_patterns(config.layers, int(model.get_total_num_hidden_layers()))
    except LayerPatternError as error:
        raise ConfigError(str(error)) from None
    if config.scales is None:
        return
    scales, _ = load_kv_scales(config.scales)
    kv_heads = int(model.get_total_num_kv_heads())
    check_layers(scales, scales, kv_heads, int(model.get_head_size()), config.scales)
    for layer in scales.values():
        layer.channel_scales(0, world)
