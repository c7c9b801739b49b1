"""vLLM's attention interface on the NPU's fused operators.

Source of the interface: ``vllm/v1/attention/backend.py`` of vLLM 0.32.0.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from vllm.v1.attention.backend import (
    AttentionCGSupport,
    AttentionImpl,
    AttentionMetadataBuilder,
    AttentionType,
    CommonAttentionMetadata,
)
from vllm.v1.kv_cache_interface import KVCacheLayout, KVQuantMode

from ascend_plugin.config import INT8_DTYPE, parse_config
from ascend_plugin.graph import npu as graphs
from ascend_plugin.kv_cache import PageFormat
from ascend_plugin.ops.npu import attention, gather, write
from ascend_plugin.ops.npu.device import npu
from ascend_plugin.ops.npu.hadamard import rotate
from ascend_plugin.ops.npu.planes import Planes, page_planes, plane_blocks, plane_slots
from ascend_plugin.ops.page_layout import Arrangement, Quantisation

from .kv_quantisation import LayerQuantisation
from .pages import NZPageBackend

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.v1.attention.backend import AttentionLayer
    from vllm.v1.kv_cache_interface import AttentionSpec, KVCacheSpec


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


def _possible_variants(vllm_config: VllmConfig) -> list[Quantisation]:
    """Return the variants that int8 layers may have; which one has which is not asked here."""
    config = parse_config(vllm_config.additional_config).kv_cache
    # Without a name it depends on the checkpoint.
    names: set[str] = {config.variant} if config.variant else {"c8d", "c8s"}
    names |= set(config.layers.values()) - {"auto"}
    return [Quantisation[name.upper()] for name in sorted(names)]


@dataclass(slots=True)
class AscendNPUMetadata:
    """One batch, as the operators take it.

    Attributes:
        num_actual_tokens: rows of the batch; those of a captured graph include padding.
        batch: lengths and blocks.
        slots: int32 ``[num_actual_tokens]``, where new tokens go among planes.
    """

    num_actual_tokens: int
    batch: attention.Batch
    slots: torch.Tensor


class AscendNPUMetadataBuilder(AttentionMetadataBuilder[AscendNPUMetadata]):
    """Turn vLLM's batch into what the fused operators take, at addresses that do not change."""

    _cudagraph_support: ClassVar[AttentionCGSupport] = AttentionCGSupport.UNIFORM_BATCH

    @classmethod
    def get_cudagraph_support(
        cls, vllm_config: VllmConfig, kv_cache_spec: KVCacheSpec
    ) -> AttentionCGSupport:
        """Return whether attention can be captured: not if pages are dequantised first.

        That path computes where tokens lie on the host, anew for every batch.
        """
        spec: Any = kv_cache_spec
        if spec.kv_quant_mode == KVQuantMode.NONE:
            return cls._cudagraph_support
        heads = vllm_config.model_config.get_num_attention_heads(vllm_config.parallel_config)
        fused = all(
            attention.fused_support(
                attention.FusedRequest(
                    vllm_config.model_config.dtype,
                    variant,
                    heads,
                    spec.num_kv_heads,
                    spec.head_size,
                    spec.block_size,
                    uniform=1,
                    window=bool(getattr(spec, "sliding_window", None)),
                )
            ).ok
            for variant in _possible_variants(vllm_config)
        )
        return cls._cudagraph_support if fused else AttentionCGSupport.NEVER

    def __init__(
        self,
        kv_cache_spec: AttentionSpec,
        layer_names: list[str],
        vllm_config: VllmConfig,
        device: torch.device,
    ) -> None:
        """Reserve the buffers that captured graphs read."""
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        self._reorder()
        tokens = vllm_config.scheduler_config.max_num_batched_tokens
        self._slots = torch.empty(tokens, dtype=torch.int32, device=device)
        self._blocks = torch.empty((0, 0), dtype=torch.int32, device=device)

    def _reorder(self) -> None:
        """Let vLLM put decoding and verifying sequences first."""
        self._init_reorder_batch_threshold(1, supports_spec_as_decode=True)

    def build(
        self,
        common_prefix_len: int,
        common_attn_metadata: CommonAttentionMetadata,
        fast_build: bool = False,
    ) -> AscendNPUMetadata:
        """Return the batch in the operators' form.

        Raises:
            ValueError: the batch mixes causal and bidirectional sequences.
        """
        told = common_attn_metadata
        if isinstance(told.causal, torch.Tensor):
            raise ValueError(
                "this batch mixes causal and bidirectional sequences, which the fused attention of "
                "the NPU does not serve."
            )
        tokens = told.num_actual_tokens
        slots = plane_slots(
            told.slot_mapping[:tokens], self._block_size(), self._room(tokens)[:tokens]
        )
        ends, lengths = _rows(told)
        batch = attention.Batch(
            ends, lengths, self._planes_of(told.block_table_tensor), _uniform(ends), told.causal
        )
        return AscendNPUMetadata(tokens, batch, slots)

    def _block_size(self) -> int:
        spec: Any = self.kv_cache_spec
        return int(spec.block_size)

    def _room(self, tokens: int) -> torch.Tensor:
        if tokens > self._slots.shape[0]:
            self._slots = torch.empty(tokens, dtype=torch.int32, device=self.device)
        return self._slots

    def _planes_of(self, block_table: torch.Tensor) -> torch.Tensor:
        """Return indices of planes in the buffer that graphs know, for block ids."""
        sequences, width = block_table.shape
        if sequences > self._blocks.shape[0] or width != self._blocks.shape[1]:
            rows = max(sequences, self.vllm_config.scheduler_config.max_num_seqs)
            self._blocks = torch.zeros((rows, width), dtype=torch.int32, device=self.device)
        return plane_blocks(block_table, out=self._blocks[:sequences])


def _rows(told: CommonAttentionMetadata) -> tuple[list[int], list[int]]:
    """Return where each sequence's rows end, and how long its context is, as numbers.

    Both are on the host already: nothing waits for the device. Rows that pad a captured graph are
    given to the sequences that pad it, which have no context.
    """
    ends = told.query_start_loc_cpu[1 : told.num_reqs + 1].tolist()
    # Exact, unless vLLM schedules drafts ahead of their verification, which the platform forbids.
    lengths = told.seq_lens_cpu_upper_bound[: told.num_reqs].tolist()
    if ends and ends[-1] < told.num_actual_tokens:
        used = ends[-1]
        for i, (end, length) in enumerate(zip(ends, lengths, strict=True)):
            if end == used and not length:
                ends[i] = min(ends[i - 1] + told.max_query_len, told.num_actual_tokens)
    if ends and ends[-1] != told.num_actual_tokens:
        raise ValueError(
            f"a batch of {told.num_actual_tokens} tokens has sequences with {ends[-1]}; the fused "
            "attention wants every row to belong to one. Set -cc.cudagraph_mode=PIECEWISE."
        )
    return ends, lengths


def _uniform(ends: list[int]) -> int:
    """Return how many rows every sequence has; 0: they differ."""
    rows = {stop - start for start, stop in pairwise([0, *ends])}
    return rows.pop() if len(rows) == 1 else 0


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
        reasons = attention.common_reasons(self._request(dtype, 128, 0))
        if reasons:
            raise ValueError(f"attention of this model is not served on an NPU: {reasons}.")

    @property
    def quantisation(self) -> Quantisation:
        """What the layer's pages hold."""
        told = self.kv_quantisation
        return Quantisation.NONE if told is None else told.quantisation

    def _request(self, dtype: torch.dtype, block_size: int, uniform: int) -> attention.FusedRequest:
        return attention.FusedRequest(
            dtype,
            self.quantisation,
            self.num_heads,
            self.num_kv_heads,
            self.head_size,
            block_size,
            uniform,
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
                arrangement=Arrangement.PLANE_MAJOR,
            )
            self._planes = page_planes(kv_cache, page.plane_layout())
            self._pages = kv_cache
            self._head = self._constants(kv_cache.device)
        return self._planes

    def _constants(self, device: torch.device) -> attention.Head:
        told = self.kv_quantisation
        scales = None
        if told is not None and told.channel_scales is not None:
            scales = write.ChannelScales.of(told.channel_scales, device)
        return attention.Head(self.num_heads, self.scale, self.window, self.quantisation, scales)

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
        write.write_planes(
            key[:tokens],
            value[:tokens],
            planes,
            told.slots[:tokens],
            self.quantisation,
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
        request = self._request(query.dtype, planes.key.shape[3], batch.uniform)
        chosen = attention.operator.choose(request).implementation.name
        if chosen == gather.NAME:
            gather.attend(query, planes, batch, self._head, out)
        elif not npu.is_current_stream_capturing():
            attention.attend(query, planes, batch, self._head, out)
        else:
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
