"""Random contents of a case, shared by every contender."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch

from ascend_plugin.bench.attention.cases import Case
from ascend_plugin.bench.errors import BenchError
from ascend_plugin.bench.runtime import DTYPES
from ascend_plugin.kv_cache import PageFormat
from ascend_plugin.ops.kv_cache_write import reference as write_reference
from ascend_plugin.ops.page_layout import Quantisation

#: Share of (token, head) rows of an int8 case that are ten times smaller than the others, as K and
#: V of attention sinks are: static scales serve them badly, so these are the ones that get patches.
QUIET_SHARE = 0.01

#: Relative error from which on a row gets a patch: above what static scales do to normal rows.
PATCH_THRESHOLD = 0.03


@dataclass(frozen=True)
class CaseData:
    """Inputs of one case.

    Attributes:
        case: what they are for.
        page: format of the plugin's pages.
        query: ``[batch * new_tokens, heads, head_dim]``, a slice of a joint q/k/v projection as in
            the engine; empty for write.
        key: ``[tokens, kv_heads, head_dim]``; write: a slice as well.
        value: as ``key``.
        slot_mapping: int64 ``[tokens]``, where key and value belong.
        block_table: int32 ``[batch, blocks]``, random.
        query_start_loc: int32 ``[batch + 1]``.
        seq_lens: int32 ``[batch]``.
        pages: ``key`` and ``value`` in pages, written by the reference operator.
        channel_scales: float32 ``[2, kv_heads, head_dim]`` of static variants, else None.
        patch_thresholds: of K and V, for pages with patches, else empty.
    """

    case: Case
    page: PageFormat
    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    slot_mapping: torch.Tensor
    block_table: torch.Tensor
    query_start_loc: torch.Tensor
    seq_lens: torch.Tensor
    pages: torch.Tensor
    channel_scales: torch.Tensor | None = None
    patch_thresholds: tuple[float, ...] = ()

    def write_arguments(self) -> dict[str, Any]:
        """Return what ``kv_cache_write`` needs beside tensors and layout."""
        if self.page.quantisation is Quantisation.NONE:
            return {}
        return {
            "channel_scales": self.channel_scales,
            "patch_thresholds": self.patch_thresholds,
            "counters": None,
        }

    def attention_arguments(self) -> dict[str, Any]:
        """Return what ``paged_attention`` needs beside tensors, layout and scale."""
        if self.page.quantisation is Quantisation.NONE:
            return {}
        return {"channel_scales": self.channel_scales, "fast": self.case.fast}


def make_data(case: Case, seed: int = 0) -> CaseData:
    """Draw the contents of a case; the same seed gives the same bytes.

    Raises:
        BenchError: a block size or head dimension that pages cannot hold.
    """
    generator = torch.Generator().manual_seed(seed)
    page = _page_format(case)
    block_table = _block_table(case, generator)
    query, key, value = _tokens(case, generator)
    slots = _slots(case, block_table, generator)
    sequences = 0 if case.phase == "write" else case.batch
    starts = torch.arange(sequences + 1, dtype=torch.int32) * case.new_tokens
    data = CaseData(
        case=case,
        page=page,
        query=query,
        key=key,
        value=value,
        slot_mapping=slots,
        block_table=block_table,
        query_start_loc=starts.to(torch.int32),
        seq_lens=torch.full((sequences,), case.context, dtype=torch.int32),
        pages=torch.zeros(page.pages_shape(case.num_blocks), dtype=page.dtype),
        channel_scales=_channel_scales(key, value) if page.quantisation.static else None,
        patch_thresholds=(PATCH_THRESHOLD,) * 2 if page.patch_slots else (),
    )
    write_reference.kv_cache_write(
        key, value, data.pages, slots, page.layout(), **data.write_arguments()
    )
    return data


def unquantised(data: CaseData) -> CaseData:
    """Return the same keys and values in pages of their own type: the truth for int8 pages."""
    case = replace(data.case, variant=data.case.element)
    page = _page_format(case)
    pages = torch.zeros(page.pages_shape(case.num_blocks), dtype=page.dtype)
    write_reference.kv_cache_write(data.key, data.value, pages, data.slot_mapping, page.layout())
    return replace(
        data, case=case, page=page, pages=pages, channel_scales=None, patch_thresholds=()
    )


def _channel_scales(key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """Return scales under which no element saturates."""
    return torch.stack([tokens.float().abs().amax(0) / 127 for tokens in (key, value)])


def _page_format(case: Case) -> PageFormat:
    geometry = case.geometry
    try:
        quantisation = Quantisation[(case.quantisation or "none").upper()]
        return PageFormat(
            DTYPES[case.element] if quantisation is Quantisation.NONE else torch.int8,
            geometry.block_size,
            geometry.kv_heads,
            geometry.head_dim,
            quantisation,
        )
    except ValueError as error:
        raise BenchError(f"pages cannot hold this case: {error}") from error


def _block_table(case: Case, generator: torch.Generator) -> torch.Tensor:
    """Return every block once, in random order: neighbours in a sequence are not neighbours."""
    blocks = torch.randperm(case.num_blocks, generator=generator, dtype=torch.int32)
    return blocks.view(-1, case.blocks_per_sequence)


def _tokens(
    case: Case, generator: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return query, key and value."""
    geometry, dtype = case.geometry, DTYPES[case.element]
    rows = case.batch * case.new_tokens
    widths = (geometry.heads, geometry.kv_heads, geometry.kv_heads)
    projection = _random((rows, sum(widths), geometry.head_dim), dtype, generator)
    query, key, value = projection.split(widths, dim=1)
    if case.phase != "write":
        shape = (case.batch * case.context, geometry.kv_heads, geometry.head_dim)
        key, value = _random(shape, dtype, generator), _random(shape, dtype, generator)
    if case.quantisation:
        for tokens in (key, value):
            quiet = torch.rand(tokens.shape[:2], generator=generator) < QUIET_SHARE
            tokens.mul_(torch.where(quiet, 0.1, 1.0)[..., None].to(dtype))
    return query[:0] if case.phase == "write" else query, key, value


def _random(shape: tuple[int, ...], dtype: torch.dtype, generator: torch.Generator) -> torch.Tensor:
    return torch.randn(shape, generator=generator).to(dtype)


def _slots(case: Case, block_table: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Return the slot of every token: block by block, or scattered for few written tokens."""
    size = case.geometry.block_size
    slots = (block_table.long()[:, :, None] * size + torch.arange(size)).flatten(1)
    if case.phase != "write":
        return slots[:, : case.context].flatten()
    if case.batch <= case.num_blocks:  # decode-like: every token belongs to another sequence
        offsets = torch.randint(size, (case.batch,), generator=generator)
        return block_table[0, : case.batch].long() * size + offsets
    return slots[0, : case.batch].contiguous()
