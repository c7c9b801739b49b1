"""Gives every attention layer its variant of the int8 KV cache, with scales and thresholds.

vLLM knows one type for the whole cache. Layers are told theirs after the model is loaded, when
their names are known, and before vLLM asks them for the size of their pages: the backend of a
layer, a class, says what its pages hold, because vLLM asks only the class.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from ascend_plugin.config import INT8_DTYPE, ConfigError, KVCacheConfig
from ascend_plugin.kv_cache.checkpoint import (
    checkpoint_folder,
    find_kv_scales,
    is_int8_scheme,
    read_checkpoint_scales,
)
from ascend_plugin.kv_cache.counters import KVCounters
from ascend_plugin.kv_cache.scales import KVScalesError, LayerScales, check_layers, load_kv_scales
from ascend_plugin.kv_cache.variants import LayerPatternError, layer_variants
from ascend_plugin.ops.page_layout import PatchCode, Quantisation

from .latent_quantisation import latent_layers, quantise_latents

if TYPE_CHECKING:
    from vllm.config import ModelConfig, VllmConfig
    from vllm.model_executor.layers.attention import Attention
    from vllm.v1.attention.backend import AttentionBackend

logger = logging.getLogger(__name__)

#: A row is patched when its error is so many times the calibrated mean of its layer.
THRESHOLD_FACTOR = 3.0


@dataclass(frozen=True, slots=True, eq=False)
class LayerQuantisation:
    """What the operators must know to write and read one layer's int8 pages.

    Attributes:
        quantisation: the layer's variant.
        patch_code: how C8P codes residuals.
        channel_scales: C8S and C8P: float32 ``[2, local_kv_heads, head_dim]``.
        patch_thresholds: C8P: relative errors of K and of V from which on a row is patched.
        counters: int64 ``[4]``, see :data:`ascend_plugin.kv_cache.counters.NAMES`.
        fast: 8-bit products instead of 16-bit ones.
    """

    quantisation: Quantisation
    patch_code: PatchCode = PatchCode.INT4
    channel_scales: torch.Tensor | None = None
    patch_thresholds: tuple[float, ...] = ()
    counters: torch.Tensor | None = None
    fast: bool = False

    @property
    def page_options(self) -> tuple[Quantisation, PatchCode]:
        """Arguments of ``PageFormat`` that describe these pages."""
        return self.quantisation, self.patch_code


def quantise_layers(
    vllm_config: VllmConfig, config: KVCacheConfig, rank: int, world: int
) -> dict[str, Quantisation]:
    """Tell every attention layer of this process how its KV cache is scaled.

    Args:
        vllm_config: the engine's configuration; its layers exist.
        config: the plugin's settings.
        rank: tensor parallel rank of this process.
        world: tensor parallel size.

    Returns:
        The variant of each layer; empty without an int8 cache.

    Raises:
        ConfigError: the settings do not fit the model.
        KVScalesError: static scales are missing or do not fit the model.
    """
    if latent_layers(vllm_config):
        return quantise_latents(vllm_config, config)
    if vllm_config.cache_config.cache_dtype != INT8_DTYPE:
        if rank == 0:
            _tell_of_unused_scales(vllm_config.model_config, vllm_config.cache_config.cache_dtype)
        return {}
    layers = _int8_layers(vllm_config)
    model = vllm_config.model_config
    own = {name: layer for name, layer in layers.items() if not _is_shared(layer)}
    scales, source = _scales(model, config, own)
    default = config.variant or ("c8s" if scales and config.scales is None else "c8d")
    complete = vllm_config.parallel_config.pipeline_parallel_size == 1
    variants = _variants(model, config.layers, default, own, complete)
    static = {name for name, variant in variants.items() if variant.static}
    _check_scales(model, scales, {name: layers[name] for name in static}, source)
    counters = KVCounters(str(model.served_model_name))
    for name, layer in own.items():
        variant = variants[name]
        layer_scales = scales[_index(name)] if variant.static else None
        told = _describe(config, variant, layer_scales, (rank, world), counters, source)
        _apply(layer, told, model)
    for layer in layers.values():
        if _is_shared(layer):
            owner = layers.get(layer.kv_sharing_target_layer_name)
            _apply(layer, None if owner is None else owner.impl.kv_quantisation, model)
    _log(variants, source if static else None)
    return variants


def _tell_of_unused_scales(model: ModelConfig, dtype: str) -> None:
    """Say that a checkpoint was made for an int8 cache, when it is served without one."""
    folder = checkpoint_folder(model)
    try:
        scheme = is_int8_scheme(quantization_config(model))
        found = folder is not None and find_kv_scales(folder, scheme)
    except KVScalesError:
        return  # nobody asked for them
    if found:
        logger.warning(
            "The checkpoint has static scales for an int8 KV cache, and the cache is %s: they are "
            "not used. Serve with --kv-cache-dtype %s for half the memory.",
            dtype,
            INT8_DTYPE,
        )


def check_bound_pages(vllm_config: VllmConfig) -> None:
    """Refuse pages that vLLM made too large, when the engine starts and not at its first request.

    To make pages of several layers equal, vLLM enlarges the blocks of some.

    Raises:
        ValueError: a block is larger than a page can be.
    """
    from vllm.config import get_layers_from_vllm_config
    from vllm.model_executor.layers.attention import Attention

    layers = get_layers_from_vllm_config(vllm_config, Attention)
    for layer in (*layers.values(), *latent_layers(vllm_config).values()):
        layout = getattr(layer.impl, "layout", None)  # of the plugin's own
        if layout is not None and layer.kv_cache.numel():
            layout(layer.kv_cache)


def _int8_layers(vllm_config: VllmConfig) -> dict[str, Attention]:
    """Return the layers that vLLM made for an int8 cache, by name."""
    from vllm.config import get_layers_from_vllm_config
    from vllm.model_executor.layers.attention import Attention

    found = get_layers_from_vllm_config(vllm_config, Attention)
    # --kv-cache-dtype-skip-layers has taken the others out already.
    return {name: layer for name, layer in found.items() if layer.kv_cache_dtype == INT8_DTYPE}


def _is_shared(layer: Attention) -> bool:
    """Say whether a layer reads the pages of another."""
    return layer.kv_sharing_target_layer_name is not None


def _index(name: str) -> int:
    from vllm.model_executor.models.utils import extract_layer_index

    return int(extract_layer_index(name))


def _variants(
    model: ModelConfig,
    patterns: Mapping[str, str],
    default: str,
    layers: Mapping[str, Attention],
    complete: bool,
) -> dict[str, Quantisation]:
    total = int(model.get_total_num_hidden_layers())
    indices = {name: _index(name) for name in layers}
    try:
        found = layer_variants(patterns, default, indices, total, complete=complete)
    except LayerPatternError as error:
        raise ConfigError(str(error)) from None
    # Layers of a draft are not calibrated with the model.
    drafts = [name for name, index in indices.items() if index >= total and found[name].static]
    if drafts:
        logger.info(
            "Static scales are those of the model's own %d layers; the draft's (%s) take c8d.",
            total,
            ", ".join(drafts),
        )
    return found | dict.fromkeys(drafts, Quantisation.C8D)


def _scales(
    model: ModelConfig, config: KVCacheConfig, layers: Mapping[str, Attention]
) -> tuple[dict[int, LayerScales], str]:
    """Return the static scales that there are, and where they come from."""
    if config.scales is not None:
        return load_kv_scales(config.scales)[0], config.scales
    wanted = {config.variant, *config.layers.values()}
    folder = checkpoint_folder(model)
    if wanted <= {"c8d", "auto"} or folder is None or not layers:
        return {}, "the checkpoint"
    head_dim = next(iter(layers.values())).head_size
    scheme = is_int8_scheme(quantization_config(model))
    kv_heads = int(model.get_total_num_kv_heads())
    return read_checkpoint_scales(folder, scheme, kv_heads, head_dim), "the checkpoint"


def quantization_config(model: ModelConfig) -> Any:
    """Return what the checkpoint says about its quantisation, a mapping or None."""
    return getattr(model.hf_config, "quantization_config", None)


def _check_scales(
    model: ModelConfig,
    scales: Mapping[int, LayerScales],
    static: Mapping[str, Attention],
    source: str,
) -> None:
    if static and not scales:
        raise ConfigError(
            f"kv_cache asks for static scales (c8s or c8p), but {source} has none. Make them with "
            "'ascend-plugin calibrate kv MODEL --text FILE -o kv_scales.safetensors' and set "
            "kv_cache.scales, or use kv_cache.variant 'c8d', which needs none."
        )
    kv_heads = int(model.get_total_num_kv_heads())
    for name, layer in static.items():
        check_layers(scales, [_index(name)], kv_heads, layer.head_size, source)


def _describe(
    config: KVCacheConfig,
    variant: Quantisation,
    scales: LayerScales | None,
    shard: tuple[int, int],
    counters: KVCounters,
    source: str,
) -> LayerQuantisation | None:
    """Return what one layer's operators must know; None: it is not quantised."""
    if variant is Quantisation.NONE:
        return None
    patched = variant is Quantisation.C8P and scales is not None
    return LayerQuantisation(
        quantisation=variant,
        patch_code=PatchCode[config.patch_code.upper()],
        channel_scales=None if scales is None else scales.channel_scales(*shard),
        patch_thresholds=_thresholds(config, scales, source) if patched and scales else (),
        counters=counters.of(variant),
        fast=config.precision == "fast",
    )


def _thresholds(config: KVCacheConfig, scales: LayerScales, source: str) -> tuple[float, float]:
    if config.patch_threshold is not None:
        return (config.patch_threshold, config.patch_threshold)
    if scales.k_error is None or scales.v_error is None:
        raise ConfigError(
            f"c8p patches rows whose error is {THRESHOLD_FACTOR:g} times the calibrated mean, but "
            f"{source} does not say that mean. Set kv_cache.patch_threshold, or calibrate with "
            "'ascend-plugin calibrate kv'."
        )
    return (THRESHOLD_FACTOR * scales.k_error, THRESHOLD_FACTOR * scales.v_error)


def _apply(layer: Attention, quantisation: LayerQuantisation | None, model: ModelConfig) -> None:
    """Set what vLLM reads from a layer and what the layer's operators are given."""
    from vllm.utils.torch_utils import kv_cache_dtype_str_to_dtype

    impl: Any = layer.impl
    if quantisation is None:
        layer.kv_cache_dtype = impl.kv_cache_dtype = "auto"
        layer.kv_cache_torch_dtype = kv_cache_dtype_str_to_dtype("auto", model)
    else:
        layer.attn_backend = backend_of(layer.attn_backend, quantisation.quantisation)
    impl.kv_quantisation = quantisation


@functools.cache
def backend_of(base: type[AttentionBackend], quantisation: Quantisation) -> type[AttentionBackend]:
    """Return the backend whose int8 pages are of one variant."""
    if getattr(base, "quantisation", None) is quantisation:
        return base
    name = f"{base.__name__}{quantisation.name.title()}"
    return type(name, (base,), {"quantisation": quantisation, "__module__": base.__module__})


def _log(variants: Mapping[str, Quantisation], source: str | None) -> None:
    counts: dict[str, int] = {}
    for variant in variants.values():
        name = "unquantised" if variant is Quantisation.NONE else variant.name.lower()
        counts[name] = counts.get(name, 0) + 1
    told = ", ".join(f"{count} layers {name}" for name, count in sorted(counts.items()))
    logger.info("int8 KV cache: %s%s.", told, f"; scales from {source}" if source else "")
