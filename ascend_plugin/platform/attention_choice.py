"""Whether the plugin's attention backend serves a layer, asked alike on every device."""

from __future__ import annotations

from typing import TYPE_CHECKING

from vllm.v1.attention.backends.registry import AttentionBackendEnum

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.v1.attention.backend import AttentionBackend
    from vllm.v1.attention.selector import AttentionSelectorConfig


def register_as_custom(path: str) -> None:
    """Register the backend class of that path as ``CUSTOM``. Idempotent."""
    from vllm.v1.attention.backends.registry import register_backend

    register_backend(AttentionBackendEnum.CUSTOM, path)


def why_not(
    backend: type[AttentionBackend],
    selected: AttentionBackendEnum | None,
    selector: AttentionSelectorConfig,
) -> list[str]:
    """Return why a layer cannot use the plugin's backend; empty: it can.

    Args:
        backend: of the device.
        selected: what ``--attention-backend`` asks for.
        selector: the layer.
    """
    from vllm.v1.attention.backend import AttentionType

    if selected is not None and selected != AttentionBackendEnum.CUSTOM:
        return [f"--attention-backend {selected.name} was asked for"]
    attn_type = AttentionType(selector.attn_type).value
    reasons = backend.validate_configuration(
        device_capability=None, **selector._replace(attn_type=attn_type)._asdict()
    )
    described = {
        "head_size not supported": f"head size {selector.head_size}",
        "block_size not supported": f"block size {selector.block_size}",
        "dtype not supported": f"dtype {selector.dtype}",
        "kv_cache_dtype not supported": f"KV cache dtype {selector.kv_cache_dtype}",
    }
    return [f"{described[r]} not supported" if r in described else r for r in reasons]


def latents_refused(vllm_config: VllmConfig) -> list[str]:
    """Return why a model's latent attention (MLA) cannot be served over NZ pages; empty: it can.

    Asked when an engine is configured, before there are layers to ask :func:`why_not` for.
    """
    from ascend_plugin.ops import checks, latent

    asked = vllm_config.attention_config.backend
    if asked not in (None, AttentionBackendEnum.CUSTOM):
        return [f"--attention-backend {asked.name} was asked for"]
    config = vllm_config.model_config.hf_text_config
    if getattr(config, "index_topk", None) is not None:
        return ["attention to chosen tokens (sparse MLA)"]
    cache = vllm_config.cache_config
    latent_dim = getattr(config, "kv_lora_rank", None)
    rotary_dim = getattr(config, "qk_rope_head_dim", None)
    if latent_dim is None or rotary_dim is None:
        return [f"kv_lora_rank {latent_dim} and qk_rope_head_dim {rotary_dim}"]
    try:
        latent.check_dims(latent_dim, rotary_dim)
        if cache.user_specified_block_size:
            checks.check_block_size(cache.block_size)
    except ValueError as error:
        return [str(error)]
    return []
