"""The AscendC kernel ``kv_cache_write``: every byte of the reference, under hostile schedules."""

from __future__ import annotations

from dataclasses import replace

import ascendc_pages
import pytest
import torch
from ascendc_pages import Layer, Planes, few_schedules
from int8_pages import PATCHED, VARIANTS

from ascend_plugin.ops.ascendc import host
from ascend_plugin.ops.kv_cache_write import reference

ALL = ("none", *VARIANTS)

Rows = tuple[torch.Tensor, torch.Tensor]


def launch(
    layer: Layer,
    planes: Planes,
    rows: Rows,
    slots: torch.Tensor,
    cores: int,
    schedule: host.Schedule,
    counters: torch.Tensor | None = None,
) -> host.Report:
    """Write tokens with the kernel."""
    key, value = rows
    return host.library("kv_cache_write").launch(
        f"kv_cache_write_{layer.entry}",
        cores,
        [
            ascendc_pages.memory(key),
            ascendc_pages.memory(value),
            slots,
            planes.codes,
            planes.extras,
            layer.channel_scales,
            counters,
            slots.shape[0],
            layer.kv_heads,
            layer.head_dim,
            layer.block_size,
            layer.blocks,
            key.stride(0),
            value.stride(0),
            layer.threshold,
            layer.threshold,
            layer.patch_code,
        ],
        schedule=schedule,
        strict=True,
    )


def write_reference(
    layer: Layer, runs: torch.Tensor, rows: Rows, slots: torch.Tensor
) -> torch.Tensor:
    """Write tokens into pages by runs; the four counters."""
    counters = torch.zeros(4, dtype=torch.int64)
    inside = torch.where(slots < layer.blocks * layer.block_size, slots, -1)
    options = {} if layer.variant == "none" else layer.int8.write_options()
    reference.kv_cache_write(*rows, runs, inside, layer.page.layout(), **options, counters=counters)
    return counters


def check(
    layer: Layer,
    rows: Rows,
    slots: torch.Tensor,
    cores: int,
    schedules: list[host.Schedule] | None = None,
) -> list[int]:
    """Write into poisoned pages; all their bytes and counters must be the reference's."""
    runs = layer.make_runs()
    before = layer.to_planes(runs)
    wanted = write_reference(layer, runs, rows, slots)
    expected = layer.to_planes(runs)
    for schedule in schedules or host.schedules():
        planes = before.clone()
        counters = torch.full((cores, 4), 7)
        launch(layer, planes, rows, slots, cores, schedule, counters)
        planes.must_equal(expected)
        assert ((counters - 7).sum(0)).tolist() == wanted.tolist(), counters
    return [int(count) for count in wanted]


@pytest.mark.parametrize("dtype", ascendc_pages.DTYPES)
@pytest.mark.parametrize("variant", ALL)
def test_quick_ragged(variant: str, dtype: str) -> None:
    """Several tiles per core, the last group of heads smaller, padding, views of a projection."""
    layer = Layer(variant, dtype, kv_heads=3, head_dim=96, block_size=16)
    key, value = ascendc_pages.fused(*layer.rows(37))
    counts = check(layer, (key, value), layer.slots(37, seed=3, skipped=4), cores=3)
    assert variant not in PATCHED or min(counts) > 0, "nothing tested"


@pytest.mark.parametrize("variant", PATCHED)
def test_quick_patches_of_one_slot(variant: str) -> None:
    """Every row an outlier, so that all tokens of a slot compete for it, far apart and close."""
    layer = Layer(variant, kv_heads=2, head_dim=32, block_size=16, threshold=0.0)
    slots = layer.slots(64).view(2, -1).T.flatten()  # two blocks in turn
    counts = check(layer, layer.rows(64), slots, cores=5)
    assert counts[2] > 0
    assert counts[3] > 0


@pytest.mark.parametrize("head_dim", [32, 64, 96, 128, 160, 256])
@pytest.mark.parametrize("variant", ALL)
def test_head_dims(variant: str, head_dim: int) -> None:
    layer = Layer(variant, "fp16", kv_heads=2, head_dim=head_dim, block_size=48)
    check(layer, layer.rows(7), layer.slots(7, seed=5), cores=2, schedules=few_schedules())


@pytest.mark.parametrize("head_dim", [16, 80, 112])
def test_head_dims_of_16_bit_pages(head_dim: int) -> None:
    layer = Layer("none", kv_heads=3, head_dim=head_dim, block_size=48)
    check(layer, layer.rows(19), layer.slots(19, seed=5), cores=2)


@pytest.mark.parametrize("cores", [1, 3, 8, 40])
@pytest.mark.parametrize("tokens", [1, 7, 130])
@pytest.mark.parametrize("variant", ALL)
def test_cores_and_tokens(variant: str, tokens: int, cores: int) -> None:
    layer = Layer(variant, kv_heads=3, head_dim=32, block_size=48)
    slots = layer.slots(tokens, seed=tokens, skipped=tokens // 8)
    check(layer, layer.rows(tokens), slots, cores, schedules=few_schedules())


@pytest.mark.parametrize("block_size", [16, 48, 128, 256])
@pytest.mark.parametrize("variant", ALL)
def test_block_sizes(variant: str, block_size: int) -> None:
    layer = Layer(variant, kv_heads=1, head_dim=64, block_size=block_size)
    check(layer, layer.rows(20), layer.slots(20, seed=block_size - 9), 2, few_schedules())


@pytest.mark.parametrize("variant", ALL)
def test_more_heads_than_a_tile_holds(variant: str) -> None:
    layer = Layer(variant, kv_heads=35, head_dim=256, block_size=16)
    check(layer, layer.rows(3), layer.slots(3), 2, few_schedules())
    layer = Layer(variant, kv_heads=70, head_dim=32, block_size=16)
    check(layer, layer.rows(3), layer.slots(3), 2, few_schedules())


@pytest.mark.parametrize("variant", ["none", "c8d", "c8p-int4"])
def test_more_tokens_than_a_chunk_of_slots(variant: str) -> None:
    layer = Layer(variant, kv_heads=1, head_dim=32, block_size=256, blocks=5)
    slots = layer.slots(1100, skipped=900)
    check(layer, layer.rows(1100), slots, 1, few_schedules())


@pytest.mark.parametrize("dtype", ascendc_pages.DTYPES)
@pytest.mark.parametrize("variant", VARIANTS)
def test_rows_that_are_not_finite(variant: str, dtype: str) -> None:
    layer = Layer(variant, dtype, kv_heads=2, head_dim=64)
    key, value = layer.rows(8)
    key[0, 0, 5] = torch.nan
    key[1, 1, 63] = torch.inf
    value[2, 0, 0] = -torch.inf
    value[3, :, 1:3] = torch.tensor([torch.inf, torch.nan])
    key[4] = torch.nan
    counts = check(layer, (key, value), torch.arange(8) + 9, 2, few_schedules())
    assert variant == "c8d" or counts[1] >= 7


@pytest.mark.parametrize("variant", VARIANTS)
def test_rows_of_extreme_size(variant: str) -> None:
    """Zeros, subnormal numbers, scales at the edge of what has a reciprocal, the largest ones."""
    sizes = torch.tensor([0.0, 1e-40, 127 * 2.0**-126, 126 * 2.0**-126, 1e-30, 1e15, 3e38, -0.0])
    layer = Layer(variant, kv_heads=2, head_dim=64)
    rows = [(each.clamp(-1, 1) * sizes[:, None, None]).bfloat16() for each in layer.rows(8)]
    check(layer, (rows[0], rows[1]), torch.arange(8) + 16, 2, few_schedules())


@pytest.mark.parametrize("variant", VARIANTS)
def test_ties_round_to_even(variant: str) -> None:
    """Halves of a code: 127 in the row makes the scale 1, or the channels' scales are 1."""
    layer = Layer(variant, "fp16", kv_heads=1, head_dim=32, threshold=0.01)
    value = torch.arange(-32, 32).view(2, 1, 32).half() + 0.5
    value[:, :, 0] = 127.0
    value[1, :, 1:5] = torch.tensor([127.5, -127.5, 128.0, 126.5])
    rows = (torch.zeros_like(value), value)
    scales = torch.ones(2, 1, 32)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(layer.int8), "channel_scales", lambda self: scales)
        check(layer, rows, torch.arange(2), 1, few_schedules())


@pytest.mark.parametrize("cores", [1, 3, 40])
@pytest.mark.parametrize("variant", VARIANTS)
def test_drafts_are_written_again(variant: str, cores: int) -> None:
    """Launches that go back within a block, and then start it anew, on what earlier ones left."""
    layer = Layer(variant, kv_heads=2, head_dim=32, block_size=16, threshold=0.02)
    runs = layer.make_runs()
    planes = layer.to_planes(runs)
    steps = [(0, 9), (5, 14), (6, 7), (7, 16), (0, 4), (3, 16)]
    for schedule in host.schedules():
        for seed, (first, end) in enumerate(steps):
            rows = layer.rows(2 * (end - first), seed)
            slots = torch.cat([torch.arange(first, end) + 16 * block for block in (2, 0)])
            write_reference(layer, runs, rows, slots)
            launch(layer, planes, rows, slots, cores, schedule)
            planes.must_equal(layer.to_planes(runs))


@pytest.mark.parametrize("variant", ALL)
def test_slots_outside_the_pages_are_skipped(variant: str) -> None:
    layer = Layer(variant, kv_heads=2, head_dim=32)
    slots = torch.tensor([-1, 64, 63, 2**40, -(2**62), 5])
    check(layer, layer.rows(6), slots, 2, few_schedules())
    nothing = torch.tensor([-1, -5, 64])
    check(layer, layer.rows(3), nothing, 2, few_schedules())


@pytest.mark.parametrize("plane", [0, 1])
def test_the_threshold_decides_within_its_bound(plane: int) -> None:
    """Squared errors 4e-6 above what is allowed are an outlier, 4e-6 below it they are none."""
    layer = Layer("c8p-int4", kv_heads=1, head_dim=256, blocks=2)
    scales = layer.channel_scales
    assert scales is not None
    rows = list(layer.rows(1))
    rows[1 - plane].zero_()
    row, channels = rows[plane][0, 0].float(), scales[plane, 0]
    scaled = row * (1.0 / channels)
    off = ((scaled - scaled.round().clamp(-127, 127)) * channels).double().square().sum()
    error = float((off / row.double().square().sum()).sqrt())
    for factor, patched in ((1 - 2e-6, 1), (1 + 2e-6, 0)):
        counters = torch.zeros(1, 4, dtype=torch.int64)
        told = replace(layer, threshold=error * factor)
        planes = told.to_planes(told.make_runs())
        launch(told, planes, (rows[0], rows[1]), torch.tensor([0]), 1, few_schedules()[0], counters)
        assert counters[0, 2] == patched


@pytest.mark.parametrize("variant", ALL)
def test_counters_are_optional_and_pages_without_codes_leave_them(variant: str) -> None:
    layer = Layer(variant, kv_heads=2, head_dim=32)
    rows, slots = layer.rows(9), layer.slots(9)
    runs = layer.make_runs()
    planes = layer.to_planes(runs)
    write_reference(layer, runs, rows, slots)
    launch(layer, planes, rows, slots, 3, few_schedules()[1])
    planes.must_equal(layer.to_planes(runs))
