"""vLLM's interface of multi-head latent attention (MLA) on the plugin's operators, for the CPU."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from vllm.v1.kv_cache_interface import KVCacheLayout

from ascend_plugin.kv_cache import LatentPageFormat
from ascend_plugin.ops import checks, latent
from ascend_plugin.ops.mla_attention import mla_attention
from ascend_plugin.ops.mla_cache_write import mla_cache_write

from .cpu import AscendCPUMetadata, AscendCPUMetadataBuilder
from .latent_pages import AllDecodes, LatentAttentionImpl, LatentPageBackend

if TYPE_CHECKING:
    from vllm.v1.attention.backend import AttentionLayer, CommonAttentionMetadata


class AscendCPUMLABackend(LatentPageBackend):
    """Attention over pages of latents in float32, float16, bfloat16 or int8."""

    supported_dtypes: ClassVar[list[torch.dtype]] = list(checks.FLOAT_DTYPES)

    @staticmethod
    def get_impl_cls() -> type[AscendCPUMLAImpl]:
        """Return the class that computes attention for one layer."""
        return AscendCPUMLAImpl

    @staticmethod
    def get_builder_cls() -> type[AscendCPUMLAMetadataBuilder]:
        """Return the class that prepares a batch."""
        return AscendCPUMLAMetadataBuilder

    @classmethod
    def get_supported_head_sizes(cls) -> list[int]:
        """Return the sums of latent and rotary dimension that pages can hold."""
        step = checks.HEAD_DIM_MULTIPLE
        limit = latent.MAX_LATENT_DIM + latent.MAX_ROTARY_DIM
        return list(range(2 * step, limit + 1, step))

    @classmethod
    def supported_kv_cache_layouts(cls) -> tuple[KVCacheLayout, ...]:
        """Return the layouts in which a block of a layer is contiguous."""
        return (KVCacheLayout.LBHNC, KVCacheLayout.BLHNC)


@dataclass(slots=True)
class AscendCPUMLAMetadata(AllDecodes, AscendCPUMetadata):
    """One batch, as the operators take it, with what vLLM's MLA layer reads."""

    num_decodes: int = 0


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
        )


class AscendCPUMLAImpl(LatentAttentionImpl[AscendCPUMLAMetadata]):
    """Multi-head latent attention of one layer."""

    remedy = "Use --attention-backend CPU_MLA."

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        """Keep the layer's constants; arguments and errors as in the base class."""
        super().__init__(*args, **kwargs)
        self._layout: tuple[int, ...] | None = None

    def layout(self, kv_cache: torch.Tensor) -> tuple[int, ...]:
        """Return the byte map of the bound cache; its block size is known only now."""
        if self._layout is None:
            _, block_size, content = kv_cache.shape
            page = LatentPageFormat(
                kv_cache.dtype, block_size, self.latent_dim, self.rotary_dim, self.quantisation
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
        query, rotary = self.split(q)
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
