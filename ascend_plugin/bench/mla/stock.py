"""vLLM's own CPU operator of latent attention, called as vLLM 0.32.0's ``CPU_MLA`` calls it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from ascend_plugin.bench.mla.cases import MlaCase
from ascend_plugin.bench.stock_operators import load_stock_operators
from ascend_plugin.bench.timing import Prepared

if TYPE_CHECKING:
    from ascend_plugin.bench.mla.runner import MlaData

#: What ``csrc/cpu/mla_decode.cpp`` is compiled for.
_LATENT_DIM, _ROTARY_DIM, _BLOCK_SIZE = 512, 64, 16


class StockMla:
    """The operator of ``vllm/v1/attention/backends/mla/cpu_mla.py``: one query token."""

    def __init__(self) -> None:
        """Load vLLM's operators; if that fails, every case is refused with the reason."""
        self._ops, self._missing = load_stock_operators("mla_decode_kvcache")

    def refusal(self, case: MlaCase) -> str | None:
        """Return why vLLM's ``CPU_MLA`` backend would not be given this case."""
        if self._missing:
            return self._missing
        if (case.latent_dim, case.rotary_dim) != (_LATENT_DIM, _ROTARY_DIM):
            return f"vLLM's CPU MLA takes latents of {_LATENT_DIM} and {_ROTARY_DIM} only"
        if case.new_tokens > 1:
            return "vLLM's CPU MLA decodes one token per sequence"
        return None

    def prepare(self, data: MlaData) -> Prepared:
        """Allocate caches as vLLM does (``torch.zeros``) and fill them as its backend does."""
        case = data.case
        width = _LATENT_DIM + _ROTARY_DIM
        blocks = -(-case.context // _BLOCK_SIZE)
        rng = torch.Generator().manual_seed(1)
        table = torch.randperm(case.batch * blocks, generator=rng, dtype=torch.int32)
        table = table.view(case.batch, blocks)
        of_blocks = table.long()[..., None] * _BLOCK_SIZE + torch.arange(_BLOCK_SIZE)
        slots = of_blocks.flatten(1)[:, : case.context].flatten()
        caches = []
        for _ in range(case.layers(data.pages.nbytes)):
            cache = torch.zeros(case.batch * blocks, _BLOCK_SIZE, width, dtype=data.latents.dtype)
            cache.view(-1, width)[slots] = torch.cat([data.latents, data.rotary], -1)
            caches.append(cache)
        query = torch.cat([data.query, data.query_rotary], -1).contiguous()
        result = torch.zeros_like(data.query)
        lengths = torch.full((case.batch,), case.context, dtype=torch.int32)

        def run(layer: int) -> None:
            self._ops.mla_decode_kvcache_cpu(
                result, query, caches[layer], data.scale, table, lengths
            )

        return Prepared(run, len(caches), result, implementation="CPU_MLA")
