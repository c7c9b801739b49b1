"""vLLM's layers on the NPU's own operators: norms, activation, rotary embedding.

vLLM dispatches its layers to ``forward_oot`` on platforms out of its tree. The replacements are
registered by the worker, in its process alone: a registration would hold for any platform.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor
from vllm import ir
from vllm.model_executor.layers import rotary_embedding
from vllm.model_executor.layers.activation import SiluAndMul
from vllm.model_executor.layers.rotary_embedding.base import RotaryEmbeddingBase

from ascend_plugin.ops.npu import elementwise

#: Name of the plugin's implementations of vLLM's IR operators.
PROVIDER = "ascend_npu"

#: Rotary embeddings that differ in how they fill their cache of cosines and sines, and no further.
ROTARY_CLASSES = (
    "RotaryEmbedding",
    "DynamicNTKAlphaRotaryEmbedding",
    "DynamicNTKScalingRotaryEmbedding",
    "LinearScalingRotaryEmbedding",
    "Llama3RotaryEmbedding",
    "NTKScalingRotaryEmbedding",
    "YaRNScalingRotaryEmbedding",
    "DeepseekScalingRotaryEmbedding",
)


def _plain(x: Tensor, weight: Tensor | None, epsilon: float, variance_size: int | None) -> bool:
    """Say whether the fused norm computes this: one weight per element, of the input's type."""
    return variance_size is None and weight is not None and weight.dtype == x.dtype


def _norm_supported(
    x: Tensor, weight: Tensor | None, epsilon: float, variance_size: int | None = None
) -> bool:
    return _plain(x, weight, epsilon, variance_size)


def _add_norm_supported(
    x: Tensor,
    x_residual: Tensor,
    weight: Tensor | None,
    epsilon: float,
    variance_size: int | None = None,
) -> bool:
    return _plain(x, weight, epsilon, variance_size)


@ir.ops.rms_norm.register_impl(PROVIDER, supports_args=_norm_supported)
def rms_norm(
    x: Tensor, weight: Tensor | None, epsilon: float, variance_size: int | None = None
) -> Tensor:
    """Return ``x / rms(x) * weight`` over the last dimension, in one launch."""
    assert weight is not None
    return elementwise.rms_norm(x, weight, epsilon)


@ir.ops.fused_add_rms_norm.register_impl(PROVIDER, supports_args=_add_norm_supported)
def fused_add_rms_norm(
    x: Tensor,
    x_residual: Tensor,
    weight: Tensor | None,
    epsilon: float,
    variance_size: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Return the norm of ``x + x_residual``, and the sum, in one launch."""
    assert weight is not None
    return elementwise.add_rms_norm(x, x_residual, weight, epsilon)


class AscendSiluAndMul(SiluAndMul):
    """SwiGLU in one launch."""

    def forward_oot(self, x: Tensor) -> Tensor:
        """Return ``silu(gate) * up`` of ``[..., 2 * d]``."""
        return elementwise.swiglu(x)


def _rotary_forward(
    self: Any, positions: Tensor, query: Tensor, key: Tensor | None = None, *rest: Any
) -> tuple[Tensor, Tensor | None]:
    """Turn query and key in one launch; with no key, or with offsets, as vLLM does it.

    Both are rows of heads, or ``[tokens, heads, head_size]``: parts of wider heads, as latent
    attention (MLA) turns them, which are copied first.
    """
    plain = query.dim() in (2, 3) and positions.dim() == 1
    if key is None or not plain or any(each is not None for each in rest):
        turned: tuple[Tensor, Tensor | None] = self.forward_native(positions, query, key, *rest)
        return turned
    cache = self._match_cos_sin_cache_dtype(query)
    found = elementwise.rotary(
        positions,
        query.reshape(query.shape[0], -1),
        key.reshape(key.shape[0], -1),
        cache,
        self.head_size,
        neox=self.is_neox_style,
    )
    return found[0].view(query.shape), found[1].view(key.shape)


_registered = False


def register_layers() -> None:
    """Replace vLLM's layers by the plugin's in this process. Idempotent."""
    global _registered
    if _registered:
        return
    _registered = True
    SiluAndMul.register_oot(AscendSiluAndMul)
    for name in ROTARY_CLASSES:
        base: Any = getattr(rotary_embedding, name, None)
        if base is not None and issubclass(base, RotaryEmbeddingBase):
            members = {"forward_oot": _rotary_forward, "__module__": __name__}
            base.register_oot(type(f"Ascend{name}", (base,), members))
