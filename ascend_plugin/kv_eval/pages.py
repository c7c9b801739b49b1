"""Pages of one sequence, written and read by the plugin's operators."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ascend_plugin.kv_cache.scales import LayerScales
from ascend_plugin.kv_eval.errors import KVEvalError
from ascend_plugin.kv_eval.routing import LayerCall
from ascend_plugin.kv_eval.variants import BLOCK_SIZE, Variant
from ascend_plugin.ops.kv_cache_write import kv_cache_write
from ascend_plugin.ops.nz import from_nz, page_planes
from ascend_plugin.ops.page_layout import PageLayout, Quantisation
from ascend_plugin.ops.paged_attention import paged_attention
from ascend_plugin.ops.quantise import dequantise_pages

#: A row is an outlier if its error exceeds so many times the calibrated mean.
OUTLIER_FACTOR = 3.0


@dataclass(frozen=True, slots=True, eq=False)
class Statics:
    """What static variants need to know of a layer.

    Attributes:
        channel_scales: float32 ``[2, kv_heads, head_dim]``, K first.
        thresholds: relative errors of K and of V above which a row is an outlier; None: unknown.
    """

    channel_scales: torch.Tensor
    thresholds: tuple[float, float] | None

    @classmethod
    def of(cls, scales: LayerScales, threshold: float | None) -> Statics:
        """Return those of a layer; ``threshold`` replaces what was calibrated."""
        if threshold is not None:
            thresholds: tuple[float, float] | None = (threshold, threshold)
        elif scales.k_error is None or scales.v_error is None:
            thresholds = None
        else:
            thresholds = (OUTLIER_FACTOR * scales.k_error, OUTLIER_FACTOR * scales.v_error)
        return cls(scales.channel_scales(), thresholds)


class PagedSequence:
    """Pages of one sequence in one variant; one layer after the other uses them.

    Pages are not cleared between layers, nor are blocks in the sequence's order: both as in a
    cache that serves.

    Attributes:
        variant: how K and V are stored.
    """

    def __init__(self, variant: Variant, capacity: int) -> None:
        """Make room for ``capacity`` tokens."""
        self.variant = variant
        blocks = -(-capacity // BLOCK_SIZE)
        self._table = torch.arange(blocks - 1, -1, -1, dtype=torch.int32)[None]
        position = torch.arange(capacity)
        block = self._table[0, position // BLOCK_SIZE].long()
        self._slots = block * BLOCK_SIZE + position % BLOCK_SIZE
        self._pages: dict[tuple[int, int], tuple[torch.Tensor, PageLayout]] = {}
        self._length = 0
        self._current: tuple[torch.Tensor, PageLayout]
        self._scales: torch.Tensor | None = None

    def write(
        self, key: torch.Tensor, value: torch.Tensor, statics: Statics | None = None
    ) -> torch.Tensor:
        """Write all tokens of a sequence.

        Args:
            key: ``[tokens, kv_heads, head_dim]``.
            value: ``[tokens, kv_heads, head_dim]``.
            statics: of the layer, for static variants.

        Returns:
            int64 ``[4]``: rows written, saturated, patched, and patches without a slot.
        """
        self._current = self._room(key.shape[1], key.shape[2])
        self._length = key.shape[0]
        pages, layout = self._current
        counters = torch.zeros(4, dtype=torch.int64)
        self._scales = None
        thresholds: tuple[float, ...] = ()
        if self.variant.quantisation.static:
            assert statics is not None  # choose_variants asked for scales
            self._scales = statics.channel_scales
            if self.variant.quantisation is Quantisation.C8P:
                thresholds = _thresholds(statics)
        kv_cache_write(
            key.contiguous(),
            value.contiguous(),
            pages,
            self._slots[: self._length],
            layout,
            channel_scales=self._scales,
            patch_thresholds=thresholds,
            counters=counters,
        )
        return counters

    def attend(self, query: torch.Tensor, call: LayerCall) -> torch.Tensor:
        """Attend ``[tokens, heads, head_dim]``, which may be of another type than the call's."""
        pages, layout = self._current
        query = query.contiguous()
        out = torch.empty_like(query)
        tokens = torch.tensor([0, self._length], dtype=torch.int32)
        paged_attention(
            query,
            pages,
            out,
            tokens,
            tokens[1:],
            self._table,
            layout,
            scale=call.scale,
            window=call.window,
            soft_cap=call.soft_cap,
            sinks=call.sinks,
            channel_scales=self._scales,
        )
        return out

    def read(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the values that the pages hold: K and V, float32 like ``key`` of ``write``."""
        pages, layout = self._current
        if self.variant.quantisation is Quantisation.NONE:
            planes = [from_nz(plane).float() for plane in page_planes(pages, layout)]
        else:
            planes = list(dequantise_pages(pages, layout, self._scales))
        # [blocks, kv_heads, block_size, head_dim] -> [tokens, kv_heads, head_dim]
        order = self._table[0].long()
        key, value = (p[order].transpose(1, 2).flatten(0, 1)[: self._length] for p in planes)
        return key, value

    def _room(self, kv_heads: int, head_dim: int) -> tuple[torch.Tensor, PageLayout]:
        kept = self._pages.get((kv_heads, head_dim))
        if kept is None:
            page = self.variant.page_format(kv_heads, head_dim)
            pages = torch.zeros(page.pages_shape(self._table.shape[1]), dtype=page.dtype)
            kept = self._pages[kv_heads, head_dim] = (pages, page.layout())
        return kept


def _thresholds(statics: Statics) -> tuple[float, float]:
    if statics.thresholds is None:
        raise KVEvalError(
            "c8p patches rows whose error exceeds 3 times the calibrated mean, and the scales "
            "have no mean errors. Calibrate with 'ascend-plugin calibrate kv', or give "
            "--threshold."
        )
    return statics.thresholds
