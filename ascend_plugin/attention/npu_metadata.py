"""What a batch is on the NPU: vLLM's metadata in the form that operators and kernels take.

Source of the interface: ``vllm/v1/attention/backend.py`` of vLLM 0.32.0.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from vllm.v1.attention.backend import (
    AttentionCGSupport,
    AttentionMetadataBuilder,
    CommonAttentionMetadata,
)
from vllm.v1.kv_cache_interface import KVQuantMode, UniformTypeKVCacheSpecs

from ascend_plugin.config import parse_config
from ascend_plugin.ops.npu import ascendc, attention, write
from ascend_plugin.ops.npu.planes import plane_blocks, plane_slots
from ascend_plugin.ops.page_layout import Quantisation

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.v1.kv_cache_interface import AttentionSpec, KVCacheSpec


def _possible_variants(vllm_config: VllmConfig) -> list[Quantisation]:
    """Return the variants that int8 layers may have; which one has which is not asked here."""
    config = parse_config(vllm_config.additional_config).kv_cache
    # Without a name it depends on the checkpoint.
    names: set[str] = {config.variant} if config.variant else {"c8d", "c8s"}
    names |= set(config.layers.values()) - {"auto"}
    speculative = vllm_config.speculative_config
    if speculative is not None and speculative.use_eagle():  # MTP too; a draft is not calibrated
        names.add("c8d")
    return [Quantisation[name.upper()] for name in sorted(names)]


def _request_of(
    vllm_config: VllmConfig, spec: Any, variant: Quantisation, rows: int
) -> attention.FusedRequest:
    """Return the request of a batch with as many query tokens in every sequence; 0: more."""
    rows = rows if rows <= ascendc.MAX_QUERY else 0
    return attention.FusedRequest(
        vllm_config.model_config.dtype,
        variant,
        vllm_config.model_config.get_num_attention_heads(vllm_config.parallel_config),
        spec.num_kv_heads,
        spec.head_size,
        spec.block_size,
        uniform=rows,
        max_query=rows,
        window=bool(getattr(spec, "sliding_window", None)),
    )


def _kernels_serve(vllm_config: VllmConfig, spec: Any) -> bool:
    """Say whether AscendC kernels write and read all pages of a kind, whatever the batch."""
    if spec.kv_quant_mode == KVQuantMode.NONE:
        return False
    dtype = vllm_config.model_config.dtype
    for variant in _possible_variants(vllm_config):
        names = ("kv_cache_write", "kv_cache_gather", "paged_attention")
        shape = (variant, dtype, spec.head_size, spec.block_size)
        if not all(ascendc.support(name, *shape).ok for name in names):
            return False
        requests = [_request_of(vllm_config, spec, variant, rows) for rows in (1, 2)]
        if any(attention.fused_support(request).ok for request in requests):
            return False
    return True


def layer_specs(group: KVCacheSpec) -> list[Any]:
    """Return the specs of the layers in a group.

    There are several where pages differ in size: of several variants, or of a draft.
    """
    several = isinstance(group, UniformTypeKVCacheSpecs)
    return list(group.kv_cache_specs.values()) if several else [group]


@dataclass(slots=True)
class AscendNPUMetadata:
    """One batch, as the operators take it.

    Attributes:
        num_actual_tokens: rows of the batch; those of a captured graph include padding.
        batch: lengths and blocks.
        slots: where ``num_actual_tokens`` new tokens go.
    """

    num_actual_tokens: int
    batch: attention.Batch
    slots: write.Slots


class AscendNPUMetadataBuilder(AttentionMetadataBuilder[AscendNPUMetadata]):
    """Turn vLLM's batch into what the fused operators take, at addresses that do not change."""

    _cudagraph_support: ClassVar[AttentionCGSupport] = AttentionCGSupport.UNIFORM_BATCH

    @classmethod
    def get_cudagraph_support(
        cls, vllm_config: VllmConfig, kv_cache_spec: KVCacheSpec
    ) -> AttentionCGSupport:
        """Return whether attention can be captured: not if pages are dequantised first.

        Those paths compute where tokens lie on the host, anew for every batch.
        """
        drafts = vllm_config.speculative_config
        rows = 1 if drafts is None else 1 + drafts.num_speculative_tokens
        found = {
            attention.operator.choose(request).implementation.name
            for spec in layer_specs(kv_cache_spec)
            if spec.kv_quant_mode != KVQuantMode.NONE
            for variant in _possible_variants(vllm_config)
            for request in (_request_of(vllm_config, spec, variant, rows) for rows in {1, rows})
        }
        captured = found <= {attention.FUSED, ascendc.NAME}
        return cls._cudagraph_support if captured else AttentionCGSupport.NEVER

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
        self._kernels_only = _kernels_serve(vllm_config, kv_cache_spec)
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
        ends, lengths = _rows(told)
        rows = [stop - start for start, stop in pairwise([0, *ends])]
        # vLLM's own buffers, at the same addresses in every step.
        device = ascendc.DeviceBatch(
            told.block_table_tensor,
            told.query_start_loc,
            told.seq_lens,
            told.max_query_len,
            told.causal,
        )
        batch = attention.Batch(
            ends,
            lengths,
            self._planes_of(told.block_table_tensor),
            attention.uniform_rows(rows),
            told.causal,
            device,
        )
        return AscendNPUMetadata(tokens, batch, self._slots_of(told.slot_mapping[:tokens]))

    def _slots_of(self, slot_mapping: torch.Tensor) -> write.Slots:
        """Return where tokens go, among planes too where an operator of torch_npu asks for that."""
        if self._kernels_only:
            return write.Slots(slot_mapping)
        tokens = slot_mapping.shape[0]
        places = plane_slots(slot_mapping, self._block_size(), self._room(tokens)[:tokens])
        return write.Slots(slot_mapping, places)

    def _block_size(self) -> int:
        spec: Any = self.kv_cache_spec
        return int(spec.block_size)

    def _room(self, tokens: int) -> torch.Tensor:
        if tokens > self._slots.shape[0]:
            self._slots = torch.empty(tokens, dtype=torch.int32, device=self.device)
        return self._slots

    def _planes_of(self, block_table: torch.Tensor) -> torch.Tensor:
        """Return indices of planes in the buffer that graphs know, for block ids.

        Empty where only kernels read pages: they take the ids.
        """
        if self._kernels_only:
            return self._blocks
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
