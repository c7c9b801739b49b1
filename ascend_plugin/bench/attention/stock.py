"""vLLM's own CPU attention, called as vLLM 0.32.0's ``CPU_ATTN`` backend calls it."""

from __future__ import annotations

from typing import Any

import torch

from ascend_plugin.bench.attention.cases import Case
from ascend_plugin.bench.attention.data import CaseData
from ascend_plugin.bench.runtime import DTYPES
from ascend_plugin.bench.stock_operators import load_stock_operators
from ascend_plugin.bench.timing import Prepared


class StockContender:
    """vLLM's CPU operators over vLLM's cache layout.

    Source: ``vllm/v1/attention/backends/cpu_attn.py``. The scheduler's metadata is made outside
    the measured call, because the engine makes it once per step and not once per layer.
    """

    name = "vllm"

    def __init__(self) -> None:
        """Load vLLM's operators; if that fails, every case is refused with the reason."""
        self._backend: Any = None
        self._isa: Any = None
        self._ops, self._missing = load_stock_operators("cpu_attention_with_kv_cache")
        if self._missing:
            return
        from vllm.v1.attention.backends import cpu_attn

        self._backend = cpu_attn.CPUAttentionBackend
        self._isa = cpu_attn._get_attn_isa

    def refusal(self, case: Case) -> str | None:
        """Return why vLLM's ``CPU_ATTN`` backend would not be given this case."""
        if self._missing:
            return self._missing
        geometry = case.geometry
        head_sizes = self._backend.get_supported_head_sizes()
        if geometry.head_dim not in head_sizes:
            allowed = ", ".join(map(str, head_sizes))
            return f"vLLM's CPU attention takes head dimensions {allowed}, not {geometry.head_dim}"
        bases = [multiple.base for multiple in self._backend.get_supported_kernel_block_sizes()]
        if all(geometry.block_size % base for base in bases):
            return (
                f"vLLM's CPU attention takes block sizes that are multiples of "
                f"{', '.join(map(str, bases))}, not {geometry.block_size}"
            )
        return None

    def prepare(self, data: CaseData) -> Prepared:
        """Allocate caches as vLLM does (``torch.zeros``) and fill them with vLLM's operator."""
        case, geometry = data.case, data.case.geometry
        isa = self._isa(DTYPES[case.element], geometry.block_size, geometry.head_dim)
        caches = [_zero_cache(data) for _ in range(case.layers)]
        result = torch.empty(data.query.shape, dtype=data.query.dtype)

        def write(layer: int) -> None:
            key_cache, value_cache = caches[layer]
            self._ops.cpu_attn_reshape_and_cache(
                data.key, data.value, key_cache, value_cache, data.slot_mapping, isa
            )

        run = write
        if case.phase != "write":
            for layer in range(case.layers):
                write(layer)
            run = self._attention(data, caches, result, isa)
        return Prepared(
            run=run,
            layers=case.layers,
            result=result,
            implementation="CPU_ATTN",
            isa=isa,
            remark="torch.zeros",
        )

    def _attention(
        self,
        data: CaseData,
        caches: list[tuple[torch.Tensor, torch.Tensor]],
        result: torch.Tensor,
        isa: str,
    ) -> Any:
        case, geometry = data.case, data.case.geometry
        metadata = self._ops.cpu_attn_get_scheduler_metadata(
            num_reqs=case.batch,
            num_heads=geometry.heads,
            num_kv_heads=geometry.kv_heads,
            head_dim=geometry.head_dim,
            seq_lens=data.seq_lens,
            dtype=data.query.dtype,
            query_start_loc=data.query_start_loc,
            causal=True,
            sliding_window_size=-1,
            isa=isa,
            enable_kv_split=True,
        )
        scale = geometry.head_dim**-0.5

        def run(layer: int) -> None:
            key_cache, value_cache = caches[layer]
            self._ops.cpu_attention_with_kv_cache(
                query=data.query,
                key_cache=key_cache,
                value_cache=value_cache,
                output=result,
                query_start_loc=data.query_start_loc,
                seq_lens=data.seq_lens,
                scale=scale,
                causal=True,
                alibi_slopes=None,
                sliding_window=-1,
                block_table=data.block_table,
                softcap=0,
                scheduler_metadata=metadata,
                s_aux=None,
            )

        return run


def _zero_cache(data: CaseData) -> tuple[torch.Tensor, torch.Tensor]:
    """Return K and V of one layer: views of a cache in vLLM's layout LBHNC."""
    geometry = data.case.geometry
    buffer = torch.zeros(data.case.stock_cache_bytes, dtype=torch.int8)
    shape = (data.case.num_blocks, geometry.kv_heads, 2 * geometry.block_size, geometry.head_dim)
    key_cache, value_cache = buffer.view(DTYPES[data.case.element]).view(shape).chunk(2, dim=2)
    return key_cache, value_cache
