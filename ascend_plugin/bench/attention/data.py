"""Random contents of a case, shared by every contender."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ascend_plugin.bench.attention.cases import Case, Variant
from ascend_plugin.bench.errors import BenchError
from ascend_plugin.kv_cache import PageFormat
from ascend_plugin.ops.kv_cache_write import reference as write_reference

DTYPES: dict[Variant, torch.dtype] = {
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "fp32": torch.float32,
}


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
    pages = torch.zeros(page.pages_shape(case.num_blocks), dtype=page.dtype)
    write_reference.kv_cache_write(key, value, pages, slots, page.layout())
    sequences = 0 if case.phase == "write" else case.batch
    starts = torch.arange(sequences + 1, dtype=torch.int32) * case.new_tokens
    return CaseData(
        case=case,
        page=page,
        query=query,
        key=key,
        value=value,
        slot_mapping=slots,
        block_table=block_table,
        query_start_loc=starts.to(torch.int32),
        seq_lens=torch.full((sequences,), case.context, dtype=torch.int32),
        pages=pages,
    )


def _page_format(case: Case) -> PageFormat:
    geometry = case.geometry
    try:
        return PageFormat(
            DTYPES[case.variant], geometry.block_size, geometry.kv_heads, geometry.head_dim
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
    geometry, dtype = case.geometry, DTYPES[case.variant]
    rows = case.batch * case.new_tokens
    widths = (geometry.heads, geometry.kv_heads, geometry.kv_heads)
    projection = _random((rows, sum(widths), geometry.head_dim), dtype, generator)
    query, key, value = projection.split(widths, dim=1)
    if case.phase == "write":
        return query[:0], key, value
    shape = (case.batch * case.context, geometry.kv_heads, geometry.head_dim)
    return query, _random(shape, dtype, generator), _random(shape, dtype, generator)


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
