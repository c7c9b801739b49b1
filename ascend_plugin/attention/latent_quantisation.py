"""Gives every latent attention layer (MLA) its variant of the int8 KV cache, and its scales.

What ``kv_quantisation.py`` is for layers with K and V. All layers of a model have one variant:
c8d, or c8s with a scale of the latents from a ModelSlim checkpoint.
"""

from __future__ import annotations

import functools
import logging
from collections import Counter
from typing import TYPE_CHECKING, Any

import torch

from ascend_plugin.config import INT8_DTYPE, ConfigError, KVCacheConfig
from ascend_plugin.kv_cache.checkpoint import checkpoint_folder, read_latent_scales
from ascend_plugin.kv_cache.counters import KVCounters
from ascend_plugin.kv_cache.variants import QUANTISATIONS
from ascend_plugin.ops.page_layout import Quantisation

if TYPE_CHECKING:
    from vllm.config import ModelConfig, VllmConfig
    from vllm.model_executor.layers.attention import MLAAttention
    from vllm.v1.attention.backend import AttentionBackend

logger = logging.getLogger(__name__)


def refuse_settings(config: KVCacheConfig) -> None:
    """Refuse settings of int8 caches that latents do not have.

    Raises:
        ConfigError: patches, a file of scales, or variants per layer.
    """
    for name, given in (
        ("variant", config.variant if config.variant == "c8p" else None),
        ("scales", config.scales),
        ("layers", config.layers or None),
    ):
        if given is not None:
            raise ConfigError(
                f"kv_cache.{name}={given!r} is not served for latent attention (MLA): its int8 "
                "cache is c8d, or c8s with the scales of a ModelSlim checkpoint (fa_k.scale), for "
                f"all layers. Leave kv_cache.{name} out."
            )


def latent_layers(vllm_config: VllmConfig) -> dict[str, MLAAttention]:
    """Return the MLA layers of this process that the plugin serves, by name."""
    from vllm.config import get_layers_from_vllm_config
    from vllm.model_executor.layers.attention import MLAAttention

    found = get_layers_from_vllm_config(vllm_config, MLAAttention)
    return {name: layer for name, layer in found.items() if hasattr(layer.impl, "kv_quantisation")}


def quantise_latents(vllm_config: VllmConfig, config: KVCacheConfig) -> dict[str, Quantisation]:
    """Tell every MLA layer of this process how its KV cache is scaled.

    Args:
        vllm_config: the engine's configuration; its layers exist.
        config: the plugin's settings.

    Returns:
        The variant of each layer with an int8 cache.

    Raises:
        ConfigError: the settings do not fit the model.
        KVScalesError: static scales of the checkpoint cannot be used.
    """
    layers = {
        name: layer
        for name, layer in latent_layers(vllm_config).items()
        if layer.kv_cache_dtype == INT8_DTYPE
    }
    if not layers:
        return {}
    refuse_settings(config)
    model = vllm_config.model_config
    first = next(iter(layers.values()))
    scales = {} if config.variant == "c8d" else _checkpoint_scales(model, first.kv_lora_rank)
    chosen = QUANTISATIONS[config.variant or ("c8s" if scales else "c8d")]
    counters = KVCounters(str(model.served_model_name))
    variants = {}
    for name, layer in layers.items():
        variants[name] = chosen
        if chosen.static and _is_draft(name, model):
            variants[name] = Quantisation.C8D  # layers of a draft are not calibrated with the model
        layer_scales = _of(scales, name) if variants[name].static else None
        _apply(layer, variants[name], layer_scales, counters, config.precision == "fast")
    counts = Counter(variant.name.lower() for variant in variants.values())
    told = ", ".join(f"{count} layers {name}" for name, count in sorted(counts.items()))
    logger.info("int8 KV cache of latents: %s.", told)
    return variants


def _index(name: str) -> int:
    from vllm.model_executor.models.utils import extract_layer_index

    return int(extract_layer_index(name))


def _is_draft(name: str, model: ModelConfig) -> bool:
    return _index(name) >= int(model.get_total_num_hidden_layers())


def _checkpoint_scales(model: ModelConfig, latent_dim: int) -> dict[int, torch.Tensor]:
    folder = checkpoint_folder(model)
    return {} if folder is None else read_latent_scales(folder, latent_dim)


def _of(scales: dict[int, torch.Tensor], name: str) -> torch.Tensor:
    if _index(name) not in scales:
        raise ConfigError(
            "kv_cache.variant is 'c8s', but the checkpoint has no scale of the latents "
            f"(fa_k.scale) for {name}. Quantise it with ModelSlim's FAQuant, or use 'c8d', which "
            "needs none."
        )
    return scales[_index(name)]


def _apply(
    layer: MLAAttention,
    variant: Quantisation,
    scales: torch.Tensor | None,
    counters: KVCounters,
    fast: bool,
) -> None:
    """Set what vLLM reads from a layer and what the layer's operators are given."""
    from .kv_quantisation import LayerQuantisation

    layer.attn_backend = backend_of(layer.attn_backend, variant, layer.qk_rope_head_dim)
    impl: Any = layer.impl
    impl.kv_quantisation = LayerQuantisation(
        variant, channel_scales=scales, counters=counters.of(variant), fast=fast
    )


@functools.cache
def backend_of(
    base: type[AttentionBackend], quantisation: Quantisation, rotary_dim: int
) -> type[AttentionBackend]:
    """Return the backend whose int8 pages have a variant and a rotary dimension."""
    told = {"quantisation": quantisation, "rotary_dim": rotary_dim, "__module__": base.__module__}
    return type(f"{base.__name__}{quantisation.name.title()}", (base,), told)
