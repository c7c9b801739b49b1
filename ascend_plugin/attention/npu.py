"""vLLM's attention interface on the NPU's fused operators and the plugin's AscendC kernels.

Source of the interface: ``vllm/v1/attention/backend.py`` of vLLM 0.32.0.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

import torch
from vllm.v1.attention.backend import (
    AttentionImpl,
    AttentionType,
)
from vllm.v1.kv_cache_interface import KVCacheLayout

from ascend_plugin.config import INT8_DTYPE
from ascend_plugin.graph import npu as graphs
from ascend_plugin.kv_cache import PageFormat
from ascend_plugin.ops.npu import ascendc, attention, paths, write
from ascend_plugin.ops.npu.device import npu
from ascend_plugin.ops.npu.hadamard import rotate
from ascend_plugin.ops.npu.planes import Planes, page_planes
from ascend_plugin.ops.page_layout import Arrangement, PatchCode, Quantisation

from .kv_quantisation import LayerQuantisation
from .npu_counters import device_counters, forget_counters
from .npu_metadata import AscendNPUMetadata, AscendNPUMetadataBuilder
from .pages import NZPageBackend

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.v1.attention.backend import AttentionLayer


#: Tokens in a block where the user does not say: what the operators for int8 pages want.
BLOCK_SIZE = 128


class AscendNPUAttentionBackend(NZPageBackend):
    """Paged attention over NZ planes in float16, bfloat16 or int8."""

    arrangement: ClassVar[Arrangement] = Arrangement.PLANE_MAJOR
    supported_dtypes: ClassVar[list[torch.dtype]] = list(write.DTYPES)

    @staticmethod
    def get_impl_cls() -> type[AscendNPUAttentionImpl]:
        """Return the class that computes attention for one layer."""
        return AscendNPUAttentionImpl

    @staticmethod
    def get_builder_cls() -> type[AscendNPUMetadataBuilder]:
        """Return the class that prepares a batch."""
        return AscendNPUMetadataBuilder

    @classmethod
    def get_preferred_block_size(cls, default_block_size: int) -> int:
        """Return the tokens in a block where the user does not say."""
        return BLOCK_SIZE

    @classmethod
    def get_supported_head_sizes(cls) -> list[int]:
        """Return the head dimensions for which the fused operator reads NZ pages."""
        return list(attention.NZ_HEAD_DIMS)

    @classmethod
    def supported_kv_cache_layouts(cls) -> tuple[KVCacheLayout, ...]:
        """Return the layout in which a layer's pages are contiguous."""
        return (KVCacheLayout.LBHNC,)


class AscendNPUAttentionImpl(AttentionImpl[AscendNPUMetadata]):
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
            ValueError: attention that the fused operators do not compute.
        """
        if attn_type != AttentionType.DECODER:
            raise ValueError(
                f"attention type {attn_type!r} is not served on an NPU; allowed is 'decoder'."
            )
        self.num_heads = num_heads
        self.num_kv_heads = num_kv_heads or num_heads
        self.head_size = head_size
        self.scale = float(scale)
        self.window = sliding_window or 0
        self.kv_cache_dtype = kv_cache_dtype
        self.kv_sharing_target_layer_name = kv_sharing_target_layer_name
        self._options = {
            "window": bool(sliding_window),
            "soft_cap": bool(logits_soft_cap),
            "alibi": alibi_slopes is not None,
            "sinks": sinks is not None,
        }
        #: Set when the model is loaded; an int8 cache needs nothing else if it is C8D.
        self.kv_quantisation = (
            LayerQuantisation(Quantisation.C8D) if kv_cache_dtype == INT8_DTYPE else None
        )
        self._planes: Planes | None = None
        self._pages: torch.Tensor | None = None
        self._head: attention.Head | None = None
        self._refuse()

    def _refuse(self) -> None:
        """Refuse, when the model is made, what no path can compute."""
        default = torch.get_default_dtype()
        dtype = default if default in write.DTYPES else torch.bfloat16
        reasons = attention.common_reasons(self._request(dtype, 128))
        if reasons:
            raise ValueError(f"attention of this model is not served on an NPU: {reasons}.")

    @property
    def quantisation(self) -> Quantisation:
        """What the layer's pages hold."""
        told = self.kv_quantisation
        return Quantisation.NONE if told is None else told.quantisation

    @property
    def patch_code(self) -> PatchCode:
        """How C8P pages code residuals."""
        told = self.kv_quantisation
        return PatchCode.INT4 if told is None else told.patch_code

    def _request(
        self, dtype: torch.dtype, block_size: int, uniform: int = 0, max_query: int = 0
    ) -> attention.FusedRequest:
        return attention.FusedRequest(
            dtype,
            self.quantisation,
            self.num_heads,
            self.num_kv_heads,
            self.head_size,
            block_size,
            uniform,
            max_query,
            **self._options,
        )

    def planes(self, kv_cache: torch.Tensor) -> Planes:
        """Return the views of the bound cache, made once."""
        if self._pages is not kv_cache or self._planes is None:
            _, kv_heads, block_size, _ = kv_cache.shape
            page = PageFormat(
                kv_cache.dtype,
                block_size,
                kv_heads,
                self.head_size,
                self.quantisation,
                self.patch_code,
                Arrangement.PLANE_MAJOR,
            )
            self._planes = page_planes(kv_cache, page.plane_layout())
            self._pages = kv_cache
            self._head = self._constants(kv_cache.device)
        return self._planes

    def _constants(self, device: torch.device) -> attention.Head:
        told = self.kv_quantisation
        layer, scales = ascendc.Int8Layer(), None
        if told is not None:
            kernel_scales = None
            if told.channel_scales is not None:
                kernel_scales = write.kernel_scales(told.channel_scales, told.quantisation)
                kernel_scales = kernel_scales.to(device).contiguous()
            if told.channel_scales is not None and told.quantisation is Quantisation.C8S:
                scales = write.ChannelScales.of(told.channel_scales, device)
            layer = ascendc.Int8Layer(
                told.quantisation,
                kernel_scales,
                told.patch_code,
                told.patch_thresholds or (0.0, 0.0),
                device_counters(told.counters, device),
            )
        return attention.Head(
            self.num_heads, self.scale, self.window, self.quantisation, scales, layer
        )

    def do_kv_cache_update(
        self,
        layer: torch.nn.Module,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        slot_mapping: torch.Tensor,
    ) -> None:
        """Write the batch's keys and values, ``[tokens, kv_heads, head_size]``, into pages."""
        told = metadata_of(str(layer.layer_name))
        if told is None:  # profiling and warm-up: there are no tokens to keep
            return
        planes = self.planes(kv_cache)
        assert self._head is not None
        tokens = min(told.num_actual_tokens, key.shape[0])
        write.write(
            key[:tokens],
            value[:tokens],
            planes,
            told.slots.first(tokens),
            self._head.layer,
            self._head.scales,
        )

    def forward(
        self,
        layer: AttentionLayer,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        attn_metadata: AscendNPUMetadata,
        output: torch.Tensor,
        output_scale: torch.Tensor | None = None,
        output_block_scale: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Attend ``query [tokens, heads, head_size]`` to the pages, into ``output``.

        Raises:
            ValueError: a fused output quantisation is asked for.
        """
        if output_scale is not None or output_block_scale is not None:
            raise ValueError("attention over NZ planes does not quantise its output.")
        if attn_metadata is None:  # profiling and warm-up: there are no pages yet
            return output.zero_()
        planes, tokens = self.planes(kv_cache), attn_metadata.num_actual_tokens
        assert self._head is not None
        self._attend(
            str(getattr(layer, "layer_name", "")),
            query[:tokens],
            planes,
            attn_metadata.batch,
            output[:tokens],
        )
        return output

    def _attend(
        self,
        layer_name: str,
        query: torch.Tensor,
        planes: Planes,
        batch: attention.Batch,
        out: torch.Tensor,
    ) -> None:
        assert self._head is not None
        block_size = planes.key.shape[3]
        request = self._request(query.dtype, block_size, batch.uniform, batch.max_query)
        chosen = attention.operator.choose(request).implementation.name
        if chosen != attention.FUSED or not npu.is_current_stream_capturing():
            # A kernel is captured like any other: it reads lengths on the device.
            paths.attend(chosen, query, planes, batch, self._head, out)
            return
        if self.quantisation is Quantisation.C8D:
            query = rotate(query)
        call = attention.fused_call(query, planes, batch, self._head)
        graphs.capture_call(layer_name, call, batch, out)


def bind_pages(vllm_config: VllmConfig) -> None:
    """Make the views and constants of every layer, before anything is captured.

    Raises:
        ValueError: a layer's pages are not what the operators read.
    """
    from vllm.config import get_layers_from_vllm_config
    from vllm.model_executor.layers.attention import Attention

    forget_counters()
    dtype = vllm_config.model_config.dtype
    for layer in get_layers_from_vllm_config(vllm_config, Attention).values():
        impl: Any = layer.impl
        if isinstance(impl, AscendNPUAttentionImpl) and layer.kv_cache.numel():
            impl.planes(layer.kv_cache)
            attention.prepare(layer.kv_cache.device, impl.head_size, dtype)


def metadata_of(layer_name: str) -> AscendNPUMetadata | None:
    """Return the batch of a layer in the step that is being run; None: it has none."""
    from vllm.forward_context import get_forward_context

    told = get_forward_context().attn_metadata
    if isinstance(told, list):  # one per micro-batch, of which there is one here
        told = told[0]
    return told.get(layer_name) if isinstance(told, dict) else told


def batch_of(layer_name: str) -> attention.Batch:
    """Return the lengths of a layer's batch, for the update of a captured graph.

    Raises:
        RuntimeError: a graph is replayed outside of a step.
    """
    told = metadata_of(layer_name)
    if told is None:
        raise RuntimeError(
            f"a graph with attention of {layer_name} is replayed without a batch; its lengths "
            "would be stale. Replay it inside vLLM's forward context."
        )
    return told.batch


graphs.follow_batches(batch_of)
