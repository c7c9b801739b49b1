"""Whether the plugin's attention backend serves a layer, asked alike on every device."""

from __future__ import annotations

from typing import TYPE_CHECKING

from vllm.v1.attention.backends.registry import AttentionBackendEnum

if TYPE_CHECKING:
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
