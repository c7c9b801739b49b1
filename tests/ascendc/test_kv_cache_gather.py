"""The AscendC kernel ``kv_cache_gather``: every bit of the reference, under hostile schedules."""

from __future__ import annotations

from dataclasses import dataclass, field

import ascendc_pages
import pytest
import torch
from ascendc_pages import Layer, Planes, few_schedules
from int8_pages import PATCHED, VARIANTS

from ascend_plugin.ops.ascendc import host
from ascend_plugin.ops.kv_cache_gather import kv_cache_gather
from ascend_plugin.ops.kv_cache_write import reference


@dataclass(frozen=True, slots=True)
class Batch:
    """Sequences, each at rows of its own with a gap before it.

    Attributes:
        lengths: tokens of each.
        blocks: pages that there are.
        columns: of the block table, of which the last are garbage.
    """

    lengths: tuple[int, ...]
    blocks: int
    block_size: int
    gap: int = 1
    columns: int = field(default=0)

    @property
    def starts(self) -> torch.Tensor:
        """First row of each sequence."""
        lengths = torch.tensor([0, *self.lengths[:-1]])
        return (lengths.cumsum(0) + self.gap * torch.arange(1, len(lengths) + 1)).int()

    @property
    def seq_lens(self) -> torch.Tensor:
        """Tokens of each sequence."""
        return torch.tensor(self.lengths, dtype=torch.int32)

    @property
    def rows(self) -> int:
        """Rows of key and value."""
        return sum(self.lengths) + self.gap * (len(self.lengths) + 1)

    def table(self) -> torch.Tensor:
        """Return shuffled blocks; garbage where no token lies."""
        needed = [-(-length // self.block_size) for length in self.lengths]
        table = torch.full((len(needed), max([*needed, 1]) + 1), 2**30, dtype=torch.int32)
        order = torch.randperm(self.blocks, generator=torch.Generator().manual_seed(5)).int()
        first = 0
        for row, count in zip(table, needed, strict=True):
            row[:count] = order[torch.arange(first, first + count) % self.blocks]
            first += count
        return table


def launch(
    layer: Layer,
    planes: Planes,
    batch: Batch,
    out: tuple[torch.Tensor, torch.Tensor],
    cores: int,
    schedule: host.Schedule,
    table: torch.Tensor | None = None,
) -> host.Report:
    """Gather with the kernel."""
    table = batch.table() if table is None else table
    return host.library("kv_cache_gather").launch(
        f"kv_cache_gather_{layer.entry}",
        cores,
        [
            planes.codes,
            planes.extras,
            layer.channel_scales,
            table,
            batch.seq_lens,
            batch.starts,
            *out,
            len(batch.lengths),
            layer.kv_heads,
            layer.head_dim,
            layer.block_size,
            layer.blocks,
            table.stride(0),
            layer.patch_code,
        ],
        schedule=schedule,
        strict=True,
    )


def written(layer: Layer) -> torch.Tensor:
    """Return pages by runs: poison, with tokens at all slots but the last of each block."""
    runs = layer.make_runs()
    slots = torch.arange(layer.blocks * layer.block_size)
    slots[layer.block_size - 1 :: layer.block_size] = -1
    rows = layer.rows(slots.numel())
    reference.kv_cache_write(*rows, runs, slots, layer.page.layout(), **layer.int8.write_options())
    return runs


def blank(layer: Layer, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
    """Return outputs full of a value that must stay where no sequence writes."""
    shape = (batch.rows, layer.kv_heads, layer.head_dim)
    filled = torch.full(shape, 777.0, dtype=ascendc_pages.DTYPES[layer.dtype])
    return filled, filled.clone()


def check(
    layer: Layer,
    lengths: tuple[int, ...],
    cores: int,
    schedules: list[host.Schedule] | None = None,
    runs: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Gather sequences; all bits of the outputs must be the operator's."""
    runs = written(layer) if runs is None else runs
    batch = Batch(lengths, layer.blocks, layer.block_size)
    want = blank(layer, batch)
    kv_cache_gather(
        runs,
        batch.table(),
        batch.seq_lens,
        batch.starts,
        *want,
        layer.page.layout(),
        channel_scales=layer.channel_scales,
    )
    planes = layer.to_planes(runs)
    for schedule in schedules or host.schedules():
        got = blank(layer, batch)
        launch(layer, planes, batch, got, cores, schedule)
        for a, b in zip(got, want, strict=True):
            ascendc_pages.same_bytes(a, b)
    return want


@pytest.mark.parametrize("dtype", ascendc_pages.DTYPES)
@pytest.mark.parametrize("variant", VARIANTS)
def test_quick_ragged(variant: str, dtype: str) -> None:
    """Blocks of several tiles, the last one partial, sequences of nothing and of one token."""
    layer = Layer(variant, dtype, kv_heads=2, head_dim=96, block_size=48, threshold=0.02)
    check(layer, (95, 0, 1, 48), cores=3)


@pytest.mark.parametrize("variant", PATCHED)
def test_quick_patches_everywhere(variant: str) -> None:
    layer = Layer(variant, kv_heads=1, head_dim=64, block_size=128, blocks=2, threshold=0.0)
    check(layer, (100, 70), cores=1)


@pytest.mark.parametrize("head_dim", [32, 64, 96, 128, 160, 256])
@pytest.mark.parametrize("variant", VARIANTS)
def test_head_dims(variant: str, head_dim: int) -> None:
    layer = Layer(variant, "fp16", kv_heads=2, head_dim=head_dim, block_size=16, threshold=0.02)
    check(layer, (37,), 2, few_schedules())


@pytest.mark.parametrize("block_size", [16, 48, 128, 256])
@pytest.mark.parametrize("variant", VARIANTS)
def test_block_sizes(variant: str, block_size: int) -> None:
    layer = Layer(variant, kv_heads=1, head_dim=64, block_size=block_size, threshold=0.02)
    check(layer, (block_size + 7, block_size - 1), 2, few_schedules())


@pytest.mark.parametrize("cores", [1, 3, 8, 40])
@pytest.mark.parametrize("variant", VARIANTS)
def test_cores(variant: str, cores: int) -> None:
    layer = Layer(variant, kv_heads=3, head_dim=32, block_size=16, threshold=0.02)
    check(layer, (7, 20, 0, 30), cores, few_schedules())


def test_rows_with_a_nan_are_nan() -> None:
    layer = Layer("c8d", kv_heads=2, head_dim=64)
    runs = written(layer)
    key, value = layer.rows(1)
    key[0, 1, 3] = torch.nan
    reference.kv_cache_write(key, value, runs, torch.tensor([18]), layer.page.layout())
    got_key, got_value = check(layer, (16, 16, 16, 16), 2, few_schedules(), runs)
    unwritten = layer.blocks * layer.kv_heads
    assert got_key.isnan().all(-1).sum() == unwritten + 1
    assert got_value.isnan().all(-1).sum() == unwritten


@pytest.mark.parametrize("variant", VARIANTS)
def test_blocks_outside_the_pages_leave_their_rows(variant: str) -> None:
    layer = Layer(variant, kv_heads=1, head_dim=32)
    batch = Batch((16, 16), layer.blocks, layer.block_size)
    planes = layer.to_planes(written(layer))
    want, got = blank(layer, batch), blank(layer, batch)
    table = torch.tensor([[1, 0], [-1, 0]], dtype=torch.int32)
    launch(layer, planes, batch, want, 2, few_schedules()[0], table)
    table = torch.tensor([[1, 0], [layer.blocks, 0]], dtype=torch.int32)
    launch(layer, planes, batch, got, 2, few_schedules()[1], table)
    for a, b in zip(got, want, strict=True):
        ascendc_pages.same_bytes(a, b)
        assert bool((a[batch.starts[1] :] == 777.0).all())
        assert not bool((a[1:17] == 777.0).any())


@pytest.mark.parametrize("variant", VARIANTS)
def test_bytes_are_read_once(variant: str) -> None:
    """Codes, scales and pools once per use, nothing for absent tokens."""
    layer = Layer(variant, kv_heads=2, head_dim=128, block_size=128, blocks=2)
    batch = Batch((200,), layer.blocks, layer.block_size)
    planes = layer.to_planes(written(layer))
    report = launch(layer, planes, batch, blank(layer, batch), 4, few_schedules()[0])
    assert report.traffic["pages"].read == 2 * 2 * 200 * 128
