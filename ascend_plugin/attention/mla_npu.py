"""vLLM's interface of multi-head latent attention (MLA) on the NPU's fused operators."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from vllm.v1.attention.backend import AttentionCGSupport
from vllm.v1.attention.backends.mla.prefill.base import MLAPrefillBackend
from vllm.v1.kv_cache_interface import KVCacheLayout, KVQuantMode

from ascend_plugin.graph import npu as graphs
from ascend_plugin.kv_cache import LatentPageFormat
from ascend_plugin.ops import npu_latents
from ascend_plugin.ops.npu import attention, mla, write
from ascend_plugin.ops.npu.device import npu
from ascend_plugin.ops.npu.latent_planes import LatentPlanes, page_latents
from ascend_plugin.ops.page_layout import Arrangement

from .latent_pages import AllDecodes, LatentAttentionImpl, LatentPageBackend
from .npu import BLOCK_SIZE
from .npu_metadata import AscendNPUMetadata, AscendNPUMetadataBuilder, layer_specs

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.model_executor.layers.attention import MLAAttention
    from vllm.v1.attention.backend import AttentionLayer, CommonAttentionMetadata
    from vllm.v1.kv_cache_interface import KVCacheSpec


class AscendNPUMLABackend(LatentPageBackend):
    """Attention over planes of latents in float16, bfloat16 or int8."""

    supported_dtypes: ClassVar[list[torch.dtype]] = list(write.DTYPES)

    @staticmethod
    def get_impl_cls() -> type[AscendNPUMLAImpl]:
        """Return the class that computes attention for one layer."""
        return AscendNPUMLAImpl

    @staticmethod
    def get_builder_cls() -> type[AscendNPUMLAMetadataBuilder]:
        """Return the class that prepares a batch."""
        return AscendNPUMLAMetadataBuilder

    @classmethod
    def get_preferred_block_size(cls, default_block_size: int) -> int:
        """Return the tokens in a block where the user does not say."""
        return BLOCK_SIZE

    @classmethod
    def get_supported_head_sizes(cls) -> list[int]:
        """Return the sum of latent and rotary dimension that the fused operator reads."""
        return [npu_latents.LATENT_DIM + npu_latents.ROTARY_DIM]

    @classmethod
    def supported_kv_cache_layouts(cls) -> tuple[KVCacheLayout, ...]:
        """Return the layout in which a layer's pages are contiguous."""
        return (KVCacheLayout.LBHNC,)


@dataclass(slots=True)
class AscendNPUMLAMetadata(AllDecodes, AscendNPUMetadata):
    """One batch, as the operators take it, with what vLLM's MLA layer reads."""

    num_decodes: int = 0


class AscendNPUMLAMetadataBuilder(AscendNPUMetadataBuilder):
    """Turn vLLM's batch into what the fused operators take; block ids and slots stay vLLM's."""

    @classmethod
    def get_cudagraph_support(
        cls, vllm_config: VllmConfig, kv_cache_spec: KVCacheSpec
    ) -> AttentionCGSupport:
        """Return whether attention can be captured: not if latents are dequantised first.

        How many blocks are is decided on the host, anew for every batch.
        """
        plain = all(spec.kv_quant_mode == KVQuantMode.NONE for spec in layer_specs(kv_cache_spec))
        return cls._cudagraph_support if plain else AttentionCGSupport.NEVER

    def build(
        self,
        common_prefix_len: int,
        common_attn_metadata: CommonAttentionMetadata,
        fast_build: bool = False,
    ) -> AscendNPUMLAMetadata:
        """Return the batch in the operators' form; errors as in the base class."""
        plain = super().build(common_prefix_len, common_attn_metadata, fast_build)
        return AscendNPUMLAMetadata(
            plain.num_actual_tokens,
            plain.batch,
            plain.slots,
            num_decodes=common_attn_metadata.num_reqs,
        )

    def _slots_of(self, slot_mapping: torch.Tensor) -> write.Slots:
        return write.Slots(slot_mapping)

    def _planes_of(self, block_table: torch.Tensor) -> torch.Tensor:
        # vLLM's own buffer, at the same address in every step: captured graphs read it.
        return block_table


class AscendNPUMLAImpl(LatentAttentionImpl[AscendNPUMLAMetadata]):
    """Multi-head latent attention of one layer."""

    remedy = "Set ASCEND_PLUGIN_DEVICE=cpu to serve on the CPU."

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        """Keep the layer's constants; arguments as in the base class.

        Raises:
            ValueError: attention that the fused operators do not compute.
        """
        super().__init__(*args, **kwargs)
        self._planes: LatentPlanes | None = None
        self._bound: tuple[int, torch.Size] | None = None
        self._head = mla.LatentHead(self.num_heads, self.scale)
        reasons = npu_latents.why_not(self.latent_dim, self.rotary_dim, self.num_heads)
        if reasons:
            raise ValueError(
                f"latent attention of this model is not served on an NPU: {'; '.join(reasons)}. "
                f"{self.remedy}"
            )

    def planes(self, kv_cache: torch.Tensor) -> LatentPlanes:
        """Return the views of the bound cache, made once."""
        bound = (kv_cache.data_ptr(), kv_cache.shape)
        if self._bound != bound or self._planes is None:
            told = self.kv_quantisation
            if told is not None:
                kv_cache = kv_cache.view(torch.int8)  # vLLM takes every quantised cache for fp8
            page = LatentPageFormat(
                kv_cache.dtype,
                kv_cache.shape[1],
                self.latent_dim,
                self.rotary_dim,
                self.quantisation,
                Arrangement.PLANE_MAJOR,
            )
            self._planes = page_latents(kv_cache, page.plane_layout())
            scales = None if told is None else told.channel_scales
            layer = mla.LatentLayer.of(self.quantisation, scales, kv_cache.device)
            self._head = mla.LatentHead(self.num_heads, self.scale, layer)
            self._bound = bound
        return self._planes

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
        slots = slot_mapping.flatten()  # negative where the batch is padded
        tokens = min(slots.shape[0], kv_c_normed.shape[0])
        planes = self.planes(kv_cache)
        rotary = k_pe[:tokens].squeeze(1)
        mla.write(kv_c_normed[:tokens], rotary, planes, slots[:tokens], self._head.layer)

    def forward_mqa(
        self,
        q: torch.Tensor | tuple[torch.Tensor, torch.Tensor],
        kv_c_and_k_pe_cache: torch.Tensor,
        attn_metadata: AscendNPUMLAMetadata,
        layer: AttentionLayer,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Attend absorbed queries to the pages.

        Args:
            q: ``[tokens, heads, latent_dim]`` and ``[tokens, heads, rotary_dim]``, or both in one.
            kv_c_and_k_pe_cache: ``[blocks, block_size, content]``.
            attn_metadata: the batch.
            layer: whose name finds the batch when a graph is replayed.

        Returns:
            ``[tokens, heads, latent_dim]``; no logsumexp.
        """
        query, rotary = self.split(q)
        planes, batch = self.planes(kv_c_and_k_pe_cache), attn_metadata.batch
        out = torch.empty_like(query, memory_format=torch.contiguous_format)
        request = mla.LatentRequest(
            query.dtype,
            planes.latents.dtype,
            self.quantisation,
            self.latent_dim,
            self.rotary_dim,
            planes.block_size,
            self.num_heads,
        )
        chosen = mla.attention_operator.choose(request).implementation.name
        if chosen == attention.FUSED and npu.is_current_stream_capturing():
            call = mla.fused_call(query, rotary, planes, batch, self._head)
            graphs.capture_call(str(getattr(layer, "layer_name", "")), call, batch, out)
        else:
            mla.attend(query, rotary, planes, batch, self._head, out)
        return out, None


class AbsorbedPrefill(MLAPrefillBackend):
    """What vLLM's layer holds for prefill that is not absorbed: there is none here."""

    @staticmethod
    def get_name() -> str:
        """Return a name for the log."""
        return "ASCEND_ABSORBED"

    def run_prefill_new_tokens(self, *_: Any, **__: Any) -> torch.Tensor:
        """Refuse to run: the metadata says that all tokens are decodes.

        Raises:
            RuntimeError: always.
        """
        raise RuntimeError("prefill on an NPU takes the absorbed path, and was sent elsewhere.")

    run_prefill_context_chunk = run_prefill_new_tokens


def latent_layers(vllm_config: VllmConfig) -> dict[str, MLAAttention]:
    """Return the MLA layers of this process that the NPU serves, by name."""
    from vllm.config import get_layers_from_vllm_config
    from vllm.model_executor.layers.attention import MLAAttention

    found = get_layers_from_vllm_config(vllm_config, MLAAttention)
    return {name: each for name, each in found.items() if isinstance(each.impl, AscendNPUMLAImpl)}


def lay_out_projections(vllm_config: VllmConfig) -> None:
    """Lay out the absorbed projections as products want them, once, after the model is loaded.

    vLLM keeps views of ``kv_b_proj``, which every product would have to copy first. The weight
    behind them is used by nothing else, and is freed. Nor is there a workspace for uncompressed
    K and V, which vLLM's layers would allocate while memory is measured.
    """
    for layer in latent_layers(vllm_config).values():
        for name in ("W_UK_T", "W_UV"):
            projection: Any = getattr(layer, name)
            projection.data = projection.data.contiguous()
        weight = getattr(layer.kv_b_proj, "weight", None)
        if isinstance(weight, torch.Tensor):
            weight.data = weight.data.new_empty(0)
        layer._chunked_prefill_workspace_size = 0


def bind_latents(vllm_config: VllmConfig) -> None:
    """Make the views of every MLA layer, before anything is captured.

    Raises:
        ValueError: a layer's pages are not what the operators read.
    """
    for layer in latent_layers(vllm_config).values():
        impl: Any = layer.impl
        if layer.kv_cache.numel():
            impl.planes(layer.kv_cache)
            attention.mask(layer.kv_cache.device)
