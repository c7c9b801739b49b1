"""Who is measured. A contender for another device is one more class here."""

from __future__ import annotations

from typing import Protocol

import torch

from ascend_plugin.bench.attention.cases import Case
from ascend_plugin.bench.attention.data import CaseData
from ascend_plugin.bench.recorded import is_recorded, recorded
from ascend_plugin.bench.timing import Prepared
from ascend_plugin.ops import kv_cache_write as write_op
from ascend_plugin.ops import paged_attention as attention_op
from ascend_plugin.ops.native import loader, memory


class Contender(Protocol):
    """An implementation of attention over a paged cache that can be measured."""

    @property
    def name(self) -> str:
        """Name in results."""

    def refusal(self, case: Case) -> str | None:
        """Return why the case cannot run; None: it can."""

    def prepare(self, data: CaseData) -> Prepared:
        """Allocate and fill caches, one per layer."""


class PluginContender:
    """The plugin's operators as its engine calls them, on this machine's device."""

    name = "ascend-plugin"

    def refusal(self, case: Case) -> str | None:
        """Return None: what pages cannot hold was refused when the data was made."""
        return None

    def prepare(self, data: CaseData) -> Prepared:
        """Allocate pages as the plugin's worker does: zeroed, then moved to huge pages."""
        case, layout = data.case, tuple(data.page.layout())
        caches, granted = [], True
        for _ in range(case.layers):
            cache = torch.zeros_like(data.pages)
            granted = memory.back_zeroed_with_huge_pages(cache) and granted
            caches.append(cache)
        result = torch.empty(data.query.shape, dtype=data.query.dtype)
        if case.phase == "write":
            extras = data.write_arguments()

            def run(layer: int) -> None:
                write_op.kv_cache_write(
                    data.key, data.value, caches[layer], data.slot_mapping, layout, **extras
                )

        else:
            extras = data.attention_arguments()
            for cache in caches:
                cache.copy_(data.pages)
            scale = case.geometry.head_dim**-0.5

            def run(layer: int) -> None:
                attention_op.paged_attention(
                    data.query,
                    caches[layer],
                    result,
                    data.query_start_loc,
                    data.seq_lens,
                    data.block_table,
                    layout,
                    scale=scale,
                    **extras,
                )

        implementation = _chosen_implementation(data)
        repeated = case.phase != "prefill" and is_recorded(case.batch)
        return Prepared(
            run=recorded(run, case.layers) if repeated else run,
            layers=case.layers,
            result=result,
            caches=tuple(caches),
            implementation=implementation,
            isa=loader.load().isa if implementation == "native" else None,
            remark="huge pages granted" if granted else "huge pages refused",
        )


def plain_reader(ours: Prepared) -> Prepared:
    """Read the plugin's pages and do nothing with them: what the memory gives right now.

    A decode cannot be much faster than this, and the memory of a shared machine may be half as
    fast in the next minute. Reads the layer farthest from the one that is measured, which is then
    in nobody's cache.
    """
    words = [cache.view(-1).view(torch.int64) for cache in ours.caches]

    def run(layer: int) -> None:
        words[(layer + len(words) // 2) % len(words)].max()

    return Prepared(run=run, layers=ours.layers, result=ours.result)


def _chosen_implementation(data: CaseData) -> str:
    """Return what the operator's dispatch chooses for the case."""
    page, dtype = data.page, data.key.dtype
    if data.case.phase == "write":
        write = write_op.WriteRequest(
            dtype, page.dtype, page.num_kv_heads, page.head_dim, page.block_size, page.quantisation
        )
        return write_op.operator.choose(write).implementation.name
    attention = attention_op.AttentionRequest(
        dtype,
        page.dtype,
        data.case.geometry.heads,
        page.num_kv_heads,
        page.head_dim,
        page.block_size,
        page.quantisation,
    )
    return attention_op.operator.choose(attention).implementation.name
