"""What the backends of all devices tell vLLM about pages of latents (MLA), and their layers.

Every token takes the weight-absorbed path (``forward_mqa``), prefill too: one kernel reads pages,
so chunks, prefix hits and drafted tokens need nothing of their own.

Source of the interface: ``vllm/model_executor/layers/attention/mla_attention.py`` of vLLM 0.32.0.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any, ClassVar, Self, TypeVar

import torch
from vllm.v1.attention.backend import (
    AttentionBackend,
    AttentionMetadata,
    AttentionType,
    MLAAttentionImpl,
    MultipleOf,
)
from vllm.v1.kv_cache_interface import KVQuantMode

from ascend_plugin.config import INT8_DTYPE
from ascend_plugin.kv_cache import LatentPageFormat
from ascend_plugin.ops import checks, latent
from ascend_plugin.ops.page_layout import Quantisation

from .kv_quantisation import LayerQuantisation
from .pages import NZPageBackend

if TYPE_CHECKING:
    from vllm.v1.kv_cache_interface import AttentionSpec

MetadataT = TypeVar("MetadataT", bound=AttentionMetadata)


class AllDecodes:
    """What vLLM's MLA layer reads of a batch, beside the number of sequences.

    It sends "decodes" to ``forward_mqa``: these are all tokens. Metadata of a device inherit it.
    """

    __slots__ = ()

    num_actual_tokens: int
    num_prefills: ClassVar[int] = 0
    prefill: ClassVar[None] = None

    @property
    def num_decode_tokens(self) -> int:
        """Every token that is not padding."""
        return self.num_actual_tokens

    @property
    def decode(self) -> Self:
        """The layer asserts that there is something."""
        return self


class LatentPageBackend(AttentionBackend):
    """Attention over pages of latents: the device adds types, sizes and its classes."""

    #: What int8 pages hold; layers of another variant get a subclass (``kv_quantisation.py``).
    quantisation: ClassVar[Quantisation] = Quantisation.C8D
    #: vLLM's spec of a layer has only the sum of latent and rotary dimension; layers with an int8
    #: cache get a subclass that knows.
    rotary_dim: ClassVar[int] = 0

    forward_includes_kv_cache_update = False
    supported_kv_cache_dtypes: ClassVar[list[Any]] = ["auto", "bfloat16", "float16", INT8_DTYPE]

    @staticmethod
    def get_name() -> str:
        """Return the member of ``AttentionBackendEnum`` that the platform registers."""
        return "CUSTOM"

    @classmethod
    def is_mla(cls) -> bool:
        """This is multi-head latent attention."""
        return True

    @staticmethod
    def get_supported_kernel_block_sizes(kv_cache_spec: Any = None) -> list[int | MultipleOf]:
        """Return the block sizes that pages can hold: whole fractals of 16 tokens."""
        return NZPageBackend.get_supported_kernel_block_sizes(kv_cache_spec)

    @classmethod
    def supports_block_size(cls, block_size: int | None) -> bool:
        """Return whether pages can hold the block size; None: not chosen yet."""
        return NZPageBackend.supports_block_size(block_size)

    @classmethod
    def supports_non_causal(cls) -> bool:
        """Attention to later tokens of the cache is served."""
        return True

    @classmethod
    def customize_spec(cls, spec: AttentionSpec) -> AttentionSpec:
        """Say how many bytes an int8 page takes; without quantisation vLLM's sizes are ours."""
        if spec.kv_quant_mode == KVQuantMode.NONE or spec.state_content_bytes is not None:
            return spec
        block_size = max(spec.block_size, checks.BLOCK_SIZE_MULTIPLE)
        latent_dim = spec.head_size - cls.rotary_dim
        page = LatentPageFormat(
            spec.dtype, block_size, latent_dim, cls.rotary_dim, cls.quantisation
        )
        return replace(spec, state_content_bytes=page.token_bytes)


class LatentAttentionImpl(MLAAttentionImpl[MetadataT]):
    """Multi-head latent attention of one layer: its constants."""

    #: What a user can do about a model that this device does not serve.
    remedy: ClassVar[str]

    # Else vLLM hands over queries in fp8 when the cache is int8.
    supports_quant_query_input = False

    def __init__(
        self,
        num_heads: int,
        head_size: int,
        scale: float,
        num_kv_heads: int,
        alibi_slopes: list[float] | None,
        sliding_window: int | None,
        kv_cache_dtype: str,
        logits_soft_cap: float | None,
        attn_type: str,
        kv_sharing_target_layer_name: str | None,
        **mla: Any,
    ) -> None:
        """Keep the layer's constants; arguments as in vLLM's ``MLAAttentionImpl``.

        Raises:
            ValueError: attention that the operators do not compute, or dimensions that pages of
                latents cannot hold.
        """
        for name, value in (
            ("attention type", None if attn_type == AttentionType.DECODER else attn_type),
            ("alibi_slopes", alibi_slopes),
            ("sliding_window", sliding_window),
            ("logits_soft_cap", logits_soft_cap),
            ("kv_sharing_target_layer_name", kv_sharing_target_layer_name),
        ):
            if value:
                raise ValueError(
                    f"latent attention with {name} {value!r} is not served over NZ pages. "
                    f"{self.remedy}"
                )
        latent.check_dims(mla["kv_lora_rank"], mla["qk_rope_head_dim"])
        self.num_heads = num_heads
        self.head_size = head_size
        self.scale = float(scale)
        self.num_kv_heads = num_kv_heads
        self.kv_cache_dtype = kv_cache_dtype
        self.latent_dim: int = mla["kv_lora_rank"]
        self.rotary_dim: int = mla["qk_rope_head_dim"]
        self.kv_b_proj = mla["kv_b_proj"]
        self.q_pad_num_heads: int | None = None
        #: Set when the model is loaded; an int8 cache needs nothing else if it is C8D.
        self.kv_quantisation = (
            LayerQuantisation(Quantisation.C8D) if kv_cache_dtype == INT8_DTYPE else None
        )

    @property
    def quantisation(self) -> Quantisation:
        """What the layer's pages hold."""
        told = self.kv_quantisation
        return Quantisation.NONE if told is None else told.quantisation

    def split(
        self, query: torch.Tensor | tuple[torch.Tensor, torch.Tensor]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return ``[tokens, heads, latent_dim]`` and ``[tokens, heads, rotary_dim]``."""
        if isinstance(query, tuple):
            return query
        absorbed, rotary = query.split([self.latent_dim, self.rotary_dim], dim=-1)
        return absorbed, rotary
