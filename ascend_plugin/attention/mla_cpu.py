"""vLLM's interface of multi-head latent attention (MLA) on the plugin's operators, for the CPU.

Every token takes the weight-absorbed path (``forward_mqa``), prefill too: one kernel reads pages,
so chunks, prefix hits and drafted tokens need nothing of their own.

Source of the interface: ``vllm/model_executor/layers/attention/mla_attention.py`` of vLLM 0.32.0.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from vllm.v1.attention.backend import (
    AttentionBackend,
    AttentionType,
    MLAAttentionImpl,
    MultipleOf,
)
from vllm.v1.kv_cache_interface import KVCacheLayout, KVQuantMode

from ascend_plugin.config import INT8_DTYPE
from ascend_plugin.kv_cache import LatentPageFormat
from ascend_plugin.ops import checks, latent
from ascend_plugin.ops.mla_attention import mla_attention
from ascend_plugin.ops.mla_cache_write import mla_cache_write
from ascend_plugin.ops.page_layout import Quantisation

from .cpu import AscendCPUMetadata, AscendCPUMetadataBuilder
from .kv_quantisation import LayerQuantisation
from .pages import NZPageBackend

if TYPE_CHECKING:
    from vllm.v1.attention.backend import AttentionLayer, CommonAttentionMetadata
    from vllm.v1.kv_cache_interface import AttentionSpec


class AscendCPUMLABackend(AttentionBackend):
    """Attention over pages of latents in float32, float16, bfloat16 or int8."""

    #: What int8 pages hold; layers of another variant get a subclass (``kv_quantisation.py``).
    quantisation: ClassVar[Quantisation] = Quantisation.C8D
    #: vLLM's spec of a layer has only the sum of latent and rotary dimension; layers with an int8
    #: cache get a subclass that knows.
    rotary_dim: ClassVar[int] = 0

    forward_includes_kv_cache_update = False
    supported_dtypes: ClassVar[list[torch.dtype]] = list(checks.FLOAT_DTYPES)
    supported_kv_cache_dtypes: ClassVar[list[Any]] = ["auto", "bfloat16", "float16", INT8_DTYPE]

    @staticmethod
    def get_name() -> str:
        """Return the member of ``AttentionBackendEnum`` that the platform registers."""
        return "CUSTOM"

    @staticmethod
    def get_impl_cls() -> type[AscendCPUMLAImpl]:
        """Return the class that computes attention for one layer."""
        return AscendCPUMLAImpl

    @staticmethod
    def get_builder_cls() -> type[AscendCPUMLAMetadataBuilder]:
        """Return the class that prepares a batch."""
        return AscendCPUMLAMetadataBuilder

    @classmethod
    def is_mla(cls) -> bool:
        """This is multi-head latent attention."""
        return True

    @classmethod
    def get_supported_head_sizes(cls) -> list[int]:
        """Return the sums of latent and rotary dimension that pages can hold."""
        step = checks.HEAD_DIM_MULTIPLE
        limit = latent.MAX_LATENT_DIM + latent.MAX_ROTARY_DIM
        return list(range(2 * step, limit + 1, step))

    @staticmethod
    def get_supported_kernel_block_sizes(kv_cache_spec: Any = None) -> list[int | MultipleOf]:
        """Return the block sizes that pages can hold: whole fractals of 16 tokens."""
        return NZPageBackend.get_supported_kernel_block_sizes(kv_cache_spec)

    @classmethod
    def supports_block_size(cls, block_size: int | None) -> bool:
        """Return whether pages can hold the block size; None: not chosen yet."""
        return NZPageBackend.supports_block_size(block_size)

    @classmethod
    def supported_kv_cache_layouts(cls) -> tuple[KVCacheLayout, ...]:
        """Return the layouts in which a block of a layer is contiguous."""
        return (KVCacheLayout.LBHNC, KVCacheLayout.BLHNC)

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


@dataclass(slots=True)
class AscendCPUMLAMetadata(AscendCPUMetadata):
    """One batch, as the operators take it, with what vLLM's MLA layer reads.

    The layer sends "decodes" to ``forward_mqa``: these are all tokens.
    """

    num_decodes: int = 0
    num_decode_tokens: int = 0
    num_prefills: int = 0
    prefill: None = None

    @property
    def decode(self) -> AscendCPUMLAMetadata:
        """The layer asserts that there is something."""
        return self


class AscendCPUMLAMetadataBuilder(AscendCPUMetadataBuilder):
    """Pass vLLM's batch on; the kernels plan their work themselves."""

    def build(
        self,
        common_prefix_len: int,
        common_attn_metadata: CommonAttentionMetadata,
        fast_build: bool = False,
    ) -> AscendCPUMLAMetadata:
        """Return the batch in the operators' form; errors as in the base class."""
        plain = super().build(common_prefix_len, common_attn_metadata, fast_build)
        return AscendCPUMLAMetadata(
            num_actual_tokens=plain.num_actual_tokens,
            query_start_loc=plain.query_start_loc,
            seq_lens=plain.seq_lens,
            block_table=plain.block_table,
            causal=plain.causal,
            num_decodes=common_attn_metadata.num_reqs,
            num_decode_tokens=plain.num_actual_tokens,
        )


class AscendCPUMLAImpl(MLAAttentionImpl[AscendCPUMLAMetadata]):
    """Multi-head latent attention of one layer."""

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
                    f"latent attention with {name} {value!r} is not served over NZ pages. Use "
                    "--attention-backend CPU_MLA."
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
        self._layout: tuple[int, ...] | None = None

    def layout(self, kv_cache: torch.Tensor) -> tuple[int, ...]:
        """Return the byte map of the bound cache; its block size is known only now."""
        if self._layout is None:
            _, block_size, content = kv_cache.shape
            kv = self.kv_quantisation
            quantisation = Quantisation.NONE if kv is None else kv.quantisation
            page = LatentPageFormat(
                kv_cache.dtype, block_size, self.latent_dim, self.rotary_dim, quantisation
            )
            # vLLM enlarges blocks to make pages of several layers equal, and keeps the bytes per
            # token: a page may then end with a few unused bytes.
            page_bytes = max(page.page_bytes, block_size * content * kv_cache.element_size())
            self._layout = tuple(page.layout()._replace(page_bytes=page_bytes))
        return self._layout

    def do_kv_cache_update(
        self,
        kv_c_normed: torch.Tensor,
        k_pe: torch.Tensor,
        kv_cache: torch.Tensor,
        slot_mapping: torch.Tensor,
        kv_cache_dtype: str,
        k_scale: torch.Tensor,
    ) -> None:
        """Write latents ``[tokens, latent_dim]`` and rotary parts ``[tokens, 1, rotary_dim]``."""
        if not kv_cache.numel():  # profiling: there are no pages yet
            return
        slots = slot_mapping.flatten()
        if slots.shape[0] > kv_c_normed.shape[0]:  # vLLM pads the batch beyond the model's tokens
            slots = slots[: kv_c_normed.shape[0]]
        kv = self.kv_quantisation
        mla_cache_write(
            kv_c_normed,
            k_pe.squeeze(1),
            kv_cache,
            slots,
            self.layout(kv_cache),
            channel_scales=None if kv is None else kv.channel_scales,
            counters=None if kv is None else kv.counters,
        )

    def forward_mqa(
        self,
        q: torch.Tensor | tuple[torch.Tensor, torch.Tensor],
        kv_c_and_k_pe_cache: torch.Tensor,
        attn_metadata: AscendCPUMLAMetadata,
        layer: AttentionLayer,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Attend absorbed queries to the pages.

        Args:
            q: ``[tokens, heads, latent_dim]`` and ``[tokens, heads, rotary_dim]``, or both in one.
            kv_c_and_k_pe_cache: ``[blocks, block_size, content]``.
            attn_metadata: the batch.
            layer: not used.

        Returns:
            ``[tokens, heads, latent_dim]``; no logsumexp.
        """
        query, rotary = (
            q if isinstance(q, tuple) else q.split([self.latent_dim, self.rotary_dim], dim=-1)
        )
        pages, kv = kv_c_and_k_pe_cache, self.kv_quantisation
        if kv is not None and pages.dtype != torch.int8:
            pages = pages.view(torch.int8)  # vLLM takes every quantised cache for fp8
        out = torch.empty_like(query, memory_format=torch.contiguous_format)
        mla_attention(
            query,
            rotary,
            pages,
            out,
            attn_metadata.query_start_loc,
            attn_metadata.seq_lens,
            attn_metadata.block_table,
            self.layout(pages),
            scale=self.scale,
            causal=attn_metadata.causal,
            channel_scales=None if kv is None else kv.channel_scales,
            fast=kv is not None and kv.fast,
        )
        return out, None
