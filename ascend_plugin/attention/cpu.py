"""vLLM's attention interface on the plugin's operators, for the CPU.

Source of the interface: ``vllm/v1/attention/backend.py`` of vLLM 0.32.0.
"""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
from vllm.v1.attention.backend import (
    AttentionCGSupport,
    AttentionImpl,
    AttentionMetadataBuilder,
    AttentionType,
    CommonAttentionMetadata,
)
from vllm.v1.kv_cache_interface import KVCacheLayout

from ascend_plugin.config import INT8_DTYPE
from ascend_plugin.kv_cache import PageFormat
from ascend_plugin.ops import checks
from ascend_plugin.ops.kv_cache_write import kv_cache_write
from ascend_plugin.ops.page_layout import Quantisation
from ascend_plugin.ops.paged_attention import paged_attention

from .kv_quantisation import LayerQuantisation
from .pages import NZPageBackend

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.v1.attention.backend import AttentionLayer
    from vllm.v1.kv_cache_interface import AttentionSpec


class AscendCPUAttentionBackend(NZPageBackend):
    """Paged attention over NZ pages in float32, float16, bfloat16 or int8."""

    supported_dtypes: ClassVar[list[torch.dtype]] = list(checks.FLOAT_DTYPES)

    @staticmethod
    def get_impl_cls() -> type[AscendCPUAttentionImpl]:
        """Return the class that computes attention for one layer."""
        return AscendCPUAttentionImpl

    @staticmethod
    def get_builder_cls() -> type[AscendCPUMetadataBuilder]:
        """Return the class that prepares a batch."""
        return AscendCPUMetadataBuilder

    @classmethod
    def get_supported_head_sizes(cls) -> list[int]:
        """Return the head dimensions that pages can hold."""
        step = checks.HEAD_DIM_MULTIPLE
        return list(range(step, checks.MAX_HEAD_DIM + 1, step))

    @classmethod
    def supported_kv_cache_layouts(cls) -> tuple[KVCacheLayout, ...]:
        """Return the layouts in which a (block, kv head) is contiguous."""
        return (KVCacheLayout.LBHNC, KVCacheLayout.BLHNC)

    @classmethod
    def supports_sink(cls) -> bool:
        """Attention sinks are served."""
        return True


@dataclass(slots=True)
class AscendCPUMetadata:
    """One batch, as the operators take it.

    Attributes:
        num_actual_tokens: rows of the batch that are not padding.
        query_start_loc: int32 ``[sequences + 1]``.
        seq_lens: int32 ``[sequences]``.
        block_table: int32 ``[sequences, max_blocks]``.
        causal: whether a token sees only itself and earlier ones.
    """

    num_actual_tokens: int
    query_start_loc: torch.Tensor
    seq_lens: torch.Tensor
    block_table: torch.Tensor
    causal: bool

    def addresses(self) -> tuple[Hashable, ...]:
        """Return all that a recorded step keeps of a batch."""
        table = self.block_table
        return (
            self.num_actual_tokens,
            self.causal,
            self.query_start_loc.data_ptr(),
            self.seq_lens.data_ptr(),
            table.data_ptr(),
            table.shape,
            table.stride(),
        )


class AscendCPUMetadataBuilder(AttentionMetadataBuilder[AscendCPUMetadata]):
    """Pass vLLM's batch on; the kernels plan their work themselves."""

    # Steps are recorded by the worker (worker/cpu_steps.py), not by vLLM's graphs of accelerators.
    _cudagraph_support: ClassVar[AttentionCGSupport] = AttentionCGSupport.NEVER

    def __init__(
        self,
        kv_cache_spec: AttentionSpec,
        layer_names: list[str],
        vllm_config: VllmConfig,
        device: torch.device,
    ) -> None:
        """Keep what vLLM hands over; the base class wants every builder to say so."""
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)

    def build(
        self,
        common_prefix_len: int,
        common_attn_metadata: CommonAttentionMetadata,
        fast_build: bool = False,
    ) -> AscendCPUMetadata:
        """Return the batch in the operators' form.

        Raises:
            ValueError: the batch mixes causal and bidirectional sequences.
        """
        batch = common_attn_metadata
        if isinstance(batch.causal, torch.Tensor):
            raise ValueError(
                "this batch mixes causal and bidirectional sequences, which attention over NZ "
                "pages does not serve; use --attention-backend CPU_ATTN."
            )
        return AscendCPUMetadata(
            num_actual_tokens=batch.num_actual_tokens,
            query_start_loc=batch.query_start_loc[: batch.num_reqs + 1],
            seq_lens=batch.seq_lens[: batch.num_reqs],
            block_table=batch.block_table_tensor[: batch.num_reqs],
            causal=batch.causal,
        )


class AscendCPUAttentionImpl(AttentionImpl[AscendCPUMetadata]):
    """Attention of one layer."""

    def __init__(
        self,
        num_heads: int,
        head_size: int,
        scale: float,
        num_kv_heads: int | None = None,
        alibi_slopes: list[float] | None = None,
        sliding_window: int | None = None,
        kv_cache_dtype: str = "auto",
        logits_soft_cap: float | None = None,
        attn_type: str = AttentionType.DECODER,
        kv_sharing_target_layer_name: str | None = None,
        sinks: torch.Tensor | None = None,
    ) -> None:
        """Keep the layer's constants; arguments as in vLLM's ``AttentionImpl``.

        Raises:
            ValueError: attention that is not a decoder's, or a head dimension pages cannot hold.
        """
        if attn_type != AttentionType.DECODER:
            raise ValueError(
                f"attention type {attn_type!r} is not served over NZ pages; allowed is 'decoder'. "
                "Use --attention-backend CPU_ATTN."
            )
        checks.check_head_dim(head_size)
        self.num_heads = num_heads
        self.num_kv_heads = num_kv_heads or num_heads
        self.head_size = head_size
        self.scale = float(scale)
        self.window = sliding_window or 0
        self.soft_cap = float(logits_soft_cap or 0.0)
        self.kv_cache_dtype = kv_cache_dtype
        self.kv_sharing_target_layer_name = kv_sharing_target_layer_name
        self.alibi_slopes = (
            None if alibi_slopes is None else torch.tensor(alibi_slopes, dtype=torch.float32)
        )
        self.sinks = sinks
        #: Set when the model is loaded; an int8 cache needs nothing else if it is C8D.
        self.kv_quantisation = (
            LayerQuantisation(Quantisation.C8D) if kv_cache_dtype == INT8_DTYPE else None
        )
        self._layout: tuple[int, ...] | None = None

    def process_weights_after_loading(self, act_dtype: torch.dtype) -> None:
        """Take the loaded sinks in the type that the operator wants."""
        if self.sinks is not None:
            self.sinks = self.sinks.detach().to(torch.float32).contiguous()

    def layout(self, kv_cache: torch.Tensor) -> tuple[int, ...]:
        """Return the byte map of the bound cache; its block size is known only now."""
        if self._layout is None:
            _, kv_heads, block_size, content = kv_cache.shape
            options = () if self.kv_quantisation is None else self.kv_quantisation.page_options
            page = PageFormat(kv_cache.dtype, block_size, kv_heads, self.head_size, *options)
            # vLLM enlarges blocks to make pages of several layers equal, and keeps the bytes per
            # token: a run may then end with a few unused bytes.
            run_bytes = max(page.run_bytes, block_size * content * kv_cache.element_size())
            self._layout = tuple(page.layout()._replace(run_bytes=run_bytes))
        return self._layout

    def do_kv_cache_update(
        self,
        layer: torch.nn.Module,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        slot_mapping: torch.Tensor,
    ) -> None:
        """Write the batch's keys and values, ``[tokens, kv_heads, head_size]``, into pages."""
        if slot_mapping.shape[0] > key.shape[0]:  # vLLM pads the batch beyond the model's tokens
            slot_mapping = slot_mapping[: key.shape[0]]
        layout, kv = self.layout(kv_cache), self.kv_quantisation
        if kv is None:
            kv_cache_write(key, value, kv_cache, slot_mapping, layout)
            return
        kv_cache_write(
            key,
            value,
            kv_cache,
            slot_mapping,
            layout,
            channel_scales=kv.channel_scales,
            patch_thresholds=kv.patch_thresholds,
            counters=kv.counters,
        )

    def forward(
        self,
        layer: AttentionLayer,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        attn_metadata: AscendCPUMetadata,
        output: torch.Tensor,
        output_scale: torch.Tensor | None = None,
        output_block_scale: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Attend ``query [tokens, heads, head_size]`` to the pages, into ``output``.

        Raises:
            ValueError: a fused output quantisation is asked for.
        """
        if output_scale is not None or output_block_scale is not None:
            raise ValueError("attention over NZ pages does not quantise its output.")
        if attn_metadata is None:  # profiling and warm-up: there are no pages yet
            return output.zero_()
        tokens, kv = attn_metadata.num_actual_tokens, self.kv_quantisation
        paged_attention(
            query[:tokens],
            kv_cache,
            output[:tokens],
            attn_metadata.query_start_loc,
            attn_metadata.seq_lens,
            attn_metadata.block_table,
            self.layout(kv_cache),
            scale=self.scale,
            causal=attn_metadata.causal,
            window=self.window,
            soft_cap=self.soft_cap,
            alibi_slopes=self.alibi_slopes,
            sinks=self.sinks,
            channel_scales=None if kv is None else kv.channel_scales,
            fast=kv is not None and kv.fast,
        )
        return output
