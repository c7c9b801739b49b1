"""The AscendC kernels behind the plugin's operators, against the same operators on the CPU."""

from __future__ import annotations

from dataclasses import dataclass

import plane_pages
import pytest
import torch
from plane_pages import Shape

from ascend_plugin.attention import npu_counters
from ascend_plugin.kv_cache import PageFormat
from ascend_plugin.ops.ascendc import library
from ascend_plugin.ops.beam_topk import beam_topk, quantise_logits
from ascend_plugin.ops.dispatch import UnsupportedRequestError
from ascend_plugin.ops.kv_cache_gather import kv_cache_gather
from ascend_plugin.ops.kv_cache_write import kv_cache_write
from ascend_plugin.ops.npu import ascendc, attention, write
from ascend_plugin.ops.npu.planes import page_planes
from ascend_plugin.ops.page_layout import Arrangement, Quantisation
from ascend_plugin.ops.paged_attention import paged_attention
from ascend_plugin.ops.quantise import dequantise_pages

#: Relative error of attention: products of 16-bit halves and 8-bit codes, one rounding at the end.
TOLERANCE = {torch.bfloat16: 6e-3, torch.float16: 2e-3}

INT8 = ("c8d", "c8s", "c8p-int4", "c8p-e3m0")
BLOCKS = 7


@pytest.fixture(autouse=True)
def _kernels(device: torch.device) -> None:
    if library.why_missing():
        pytest.skip(library.why_missing())


WRITES = [
    *(Shape(variant) for variant in (*INT8, "none")),
    Shape("c8d", 3, 96, 16, torch.float16),
    Shape("c8s", 1, 64, 32, torch.float16),
    Shape("c8p-int4", 3, 32, 16),
    Shape("c8p-e3m0", 1, 256, 64, torch.float16),
    Shape("none", 3, 80, 16, torch.float16),
]


def slots_of(shape: Shape, tokens: int) -> torch.Tensor:
    """Slots of consecutive tokens in two scattered blocks and more, some of them padding."""
    order = torch.tensor([4, 2, 5, 1, 6])
    places = torch.arange(tokens)
    slots = order[places // shape.block_size % 5] * shape.block_size + places % shape.block_size
    slots[torch.arange(tokens) % 7 == 5] = -1
    return slots


@pytest.mark.parametrize("shape", WRITES, ids=str)
def test_pages_are_those_of_the_cpu(shape: Shape, device: torch.device) -> None:
    tokens = min(45, 2 * shape.block_size)
    rows, slots = shape.rows(tokens + 2), slots_of(shape, tokens)
    wanted_counts = torch.zeros(4, dtype=torch.int64)
    wanted = plane_pages.reference_pages(shape, BLOCKS, rows, slots, wanted_counts)
    counts = torch.zeros(ascendc.cores_of(device).vector, 4, dtype=torch.int64, device=device)
    got = plane_pages.device_pages(shape, BLOCKS, rows, slots, device, counts)
    found = plane_pages.arrays_of_planes(shape, got)
    arrays = plane_pages.arrays_of_runs(shape, wanted)
    assert found.keys() == arrays.keys()
    for name, array in arrays.items():
        tags = arrays.get(f"{name[0]} tags")
        if tags is not None and name[2:] in ("scales", "codes"):
            # What an empty slot holds is nobody's.
            assert torch.equal(found[name][tags != 0], array[tags != 0]), name
        else:
            assert torch.equal(found[name], array), name
    if shape.quantisation is not Quantisation.NONE:
        assert counts.cpu().sum(0).tolist() == wanted_counts.tolist()
        assert wanted_counts[0] == 2 * shape.kv_heads * int((slots >= 0).sum())
    if shape.quantisation is Quantisation.C8P:
        assert wanted_counts[2] > 0


def test_rows_that_are_not_contiguous_are_written_in_one_launch(device: torch.device) -> None:
    from ascend_plugin.ops.sim.runtime import Runtime

    if not library.simulated():
        pytest.skip("launches are counted on the simulated NPU")
    for shape in WRITES[:5]:
        rows, slots = shape.rows(5).to(device), slots_of(shape, 5).to(device)
        pages = torch.zeros(shape.planes.pages_shape(BLOCKS), dtype=shape.planes.dtype).to(device)
        planes = page_planes(pages, shape.planes.plane_layout())
        code = plane_pages.VARIANTS[shape.variant][1]
        scales = None if shape.scales is None else shape.scales.to(device)
        layer = ascendc.Int8Layer(shape.quantisation, scales, code)
        key, value = shape.split(rows)
        assert not value.is_contiguous()
        torch.npu.synchronize()
        before = Runtime().counters()["launches"]
        write.write(key, value, planes, write.Slots(slots), layer)
        torch.npu.synchronize()
        assert Runtime().counters()["launches"] - before == 1, shape


def test_counts_reach_the_host_without_waiting(
    device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(npu_counters, "PERIOD", 0.0)
    npu_counters.forget_counters()
    host = torch.zeros(4, dtype=torch.int64)
    counts = npu_counters.device_counters(host, device)
    assert npu_counters.device_counters(host, device) is counts
    assert npu_counters.device_counters(None, device) is None
    shape = Shape("c8d")
    rows, slots = shape.rows(5), torch.arange(5)
    plane_pages.device_pages(shape, BLOCKS, rows, slots, device, counts)
    npu_counters.follow_counters()  # begins a copy
    torch.npu.synchronize()
    npu_counters.follow_counters()  # finds it done, and begins the next
    written = 2 * 5 * shape.kv_heads
    assert host.tolist() == [written, 0, 0, 0]
    plane_pages.device_pages(shape, BLOCKS, rows, slots, device, counts)
    torch.npu.synchronize()
    npu_counters.follow_counters()
    assert host.tolist() == [written, 0, 0, 0]  # the copy was older than the second write
    torch.npu.synchronize()
    npu_counters.follow_counters()
    assert host.tolist() == [2 * written, 0, 0, 0]
    npu_counters.forget_counters()


@dataclass(frozen=True)
class Case:
    """A batch: (query rows, context tokens) of each sequence."""

    shape: Shape
    sequences: tuple[tuple[int, int], ...]
    heads: int = 4
    window: int = 0


DECODE = ((1, 20), (1, 200), (1, 1), (1, 128))
RAGGED = ((1, 20), (4, 150), (2, 2), (3, 129))

CASES = [
    *(Case(Shape(variant), DECODE) for variant in INT8),
    *(Case(Shape(variant), RAGGED) for variant in INT8),
    Case(Shape("c8d", 1, 64, 16, torch.float16), ((16, 40), (16, 16)), 8),
    Case(Shape("c8p-int4", 1, 256, 64), ((2, 70), (1, 64)), 3),
    Case(Shape("c8s", 2, 96, 32, torch.float16), RAGGED, 2),
    Case(Shape("c8d"), RAGGED, window=16),
    Case(Shape("c8p-e3m0", 2, 64, 16), DECODE, 16, window=33),
]


class Cache:
    """The same tokens in pages on the CPU and on the device."""

    def __init__(self, case: Case, device: torch.device) -> None:
        self.case, self.device = case, device
        shape, size = case.shape, case.shape.block_size
        self.rows = [rows for rows, _ in case.sequences]
        self.lengths = [length for _, length in case.sequences]
        needed = [-(-length // size) for length in self.lengths]
        blocks = 1 + sum(needed)
        free = torch.randperm(blocks - 1, generator=torch.Generator().manual_seed(3)) + 1
        self.table = torch.zeros((len(needed), max(needed) + 1), dtype=torch.int32)
        slots, at = [], 0
        for i, (count, length) in enumerate(zip(needed, self.lengths, strict=True)):
            self.table[i, :count] = free[at : at + count]
            at += count
            places = torch.arange(length)
            slots.append(self.table[i, places // size].long() * size + places % size)
        every = torch.cat(slots)
        rows = shape.rows(every.shape[0], seed=5)
        counts = torch.zeros(4, dtype=torch.int64)
        self.cpu = plane_pages.reference_pages(shape, blocks, rows, every, counts)
        self.npu = plane_pages.device_pages(shape, blocks, rows, every, device)
        generator = torch.Generator().manual_seed(6)
        shape_of_query = (sum(self.rows), case.heads, shape.head_dim)
        self.query = torch.randn(shape_of_query, generator=generator).to(shape.dtype)

    def wanted(self) -> torch.Tensor:
        return plane_pages.reference_attention(
            self.case.shape,
            self.cpu,
            self.query,
            self.rows,
            self.lengths,
            self.table,
            self.case.window,
        )

    def attend(self) -> torch.Tensor:
        out = torch.full_like(self.query, 7.0).to(self.device)
        paged_attention(
            self.query.to(self.device),
            self.npu,
            out,
            torch.tensor([0, *self.rows]).cumsum(0).to(torch.int32),
            torch.tensor(self.lengths, dtype=torch.int32),
            self.table.to(self.device),
            self.case.shape.planes.plane_layout(),
            scale=self.case.shape.head_dim**-0.5,
            window=self.case.window,
            channel_scales=self.case.shape.scales,
        )
        return out.cpu()


def error(got: torch.Tensor, want: torch.Tensor) -> float:
    assert bool(torch.isfinite(got).all())
    return float((got.double() - want.double()).norm() / want.double().norm())


def chosen() -> list[str]:
    """Return the implementation of the latest new kind of attention call."""
    return [choice.implementation.name for choice in attention.operator._choices.values()]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_attention_is_that_of_the_cpu(case: Case, device: torch.device) -> None:
    attention.operator.forget()
    cache = Cache(case, device)
    assert error(cache.attend(), cache.wanted()) < TOLERANCE[case.shape.dtype]
    assert chosen() == [ascendc.NAME]


@pytest.mark.parametrize("variant", INT8)
def test_prefill_dequantises_in_one_launch(variant: str, device: torch.device) -> None:
    attention.operator.forget()
    cache = Cache(Case(Shape(variant), ((1, 20), (40, 150), (30, 30))), device)
    assert error(cache.attend(), cache.wanted()) < TOLERANCE[torch.bfloat16]
    assert chosen() == [attention.KERNEL_GATHER]


@pytest.mark.parametrize("variant", INT8)
def test_a_captured_launch_follows_the_lengths_in_memory(
    variant: str, device: torch.device
) -> None:
    """Blocks, lengths and rows of each sequence change between replays, and nothing is updated."""
    shape = Shape(variant, block_size=32)
    cache = Cache(Case(shape, ((1, 40), (3, 90), (2, 31))), device)
    code = plane_pages.VARIANTS[variant][1]
    scales = None if shape.scales is None else shape.scales.to(device)
    layer = ascendc.Int8Layer(shape.quantisation, scales, code)
    planes = page_planes(cache.npu, shape.planes.plane_layout())
    table = cache.table.to(device)
    starts = torch.zeros(4, dtype=torch.int32, device=device)
    lengths = torch.zeros(3, dtype=torch.int32, device=device)
    batch = ascendc.DeviceBatch(table, starts, lengths, max_query=4)
    query, out = cache.query.to(device), torch.zeros_like(cache.query).to(device)
    graph = torch.npu.NPUGraph()
    with torch.npu.graph(graph):
        ascendc.attend(query, planes, batch, layer, out, shape.head_dim**-0.5)
    for rows, seen in (
        ((1, 3, 2), (40, 90, 31)),
        ((2, 0, 4), (12, 90, 30)),
        ((2, 2, 2), (3, 2, 9)),
    ):
        lengths.copy_(torch.tensor(seen))
        starts.copy_(torch.tensor([0, *rows]).cumsum(0))
        out.fill_(float("nan"))
        graph.replay()
        cache.rows, cache.lengths = list(rows), list(seen)
        assert error(out.cpu(), cache.wanted()) < TOLERANCE[shape.dtype]


def test_rows_without_context_are_zero(device: torch.device) -> None:
    """Sequences that pad a captured graph."""
    shape = Shape("c8d")
    cache = Cache(Case(shape, ((2, 30), (1, 9))), device)
    planes = page_planes(cache.npu, shape.planes.plane_layout())
    lengths = torch.tensor([30, 0], dtype=torch.int32, device=device)
    starts = torch.tensor([0, 2, 3], dtype=torch.int32, device=device)
    batch = ascendc.DeviceBatch(cache.table.to(device), starts, lengths, max_query=2)
    out = torch.full_like(cache.query, float("nan")).to(device)
    layer = ascendc.Int8Layer(shape.quantisation)
    ascendc.attend(cache.query.to(device), planes, batch, layer, out, 0.1)
    assert bool((out[2] == 0).all())
    assert bool(torch.isfinite(out[:2].cpu()).all())


@pytest.mark.parametrize("variant", INT8)
def test_sequences_are_copied_out_of_pages(variant: str, device: torch.device) -> None:
    shape = Shape(variant, block_size=32, dtype=torch.float16)
    cache = Cache(Case(shape, ((1, 40), (1, 5), (1, 64))), device)
    key, value = dequantise_pages(cache.cpu, shape.runs.layout(), shape.scales)
    rows = sum(cache.lengths)
    got = [torch.zeros(rows, 2, 128, dtype=torch.float16, device=device) for _ in range(2)]
    starts = torch.tensor([0, *cache.lengths[:-1]]).cumsum(0).to(torch.int32)
    kv_cache_gather(
        cache.npu,
        cache.table.to(device),
        torch.tensor(cache.lengths, dtype=torch.int32, device=device),
        starts.to(device),
        *got,
        shape.planes.plane_layout(),
        channel_scales=shape.scales,
    )
    for found, pages in zip(got, (key, value), strict=True):
        parts = [
            pages[cache.table[i].long()].transpose(1, 2).flatten(0, 1)[:length]
            for i, length in enumerate(cache.lengths)
        ]
        wanted = torch.cat(parts)
        assert torch.allclose(found.cpu().float(), wanted, rtol=2e-3, atol=1e-5)


@pytest.mark.parametrize("dtype", [None, torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_best_tokens_are_those_of_the_cpu(dtype: torch.dtype | None, device: torch.device) -> None:
    logits = torch.randn(3, 1000, generator=torch.Generator().manual_seed(2)) * 5
    logits = logits if dtype is None else logits.to(dtype)
    codes, scales = quantise_logits(logits.float())
    exact = None if dtype is None else logits
    wanted = beam_topk(codes, scales, 8, exact)
    on_device = None if exact is None else exact.to(device)
    got = beam_topk(codes.to(device), scales.to(device), 8, on_device)
    assert torch.equal(got.indices.cpu(), wanted.indices)
    assert torch.equal(got.scores.cpu(), wanted.scores)
    assert torch.allclose(got.log_probs.cpu(), wanted.log_probs, atol=1e-5)


def _write(shape: Shape, device: torch.device, rows: torch.Tensor, **options: object) -> None:
    pages = torch.zeros(shape.planes.pages_shape(2), dtype=shape.planes.dtype, device=device)
    slots = torch.arange(rows.shape[0], device=device)
    layout = shape.planes.plane_layout()
    scales = {"channel_scales": shape.scales, "patch_thresholds": shape.thresholds}
    kv_cache_write(rows, rows, pages, slots, layout, **{**scales, **options})


@pytest.mark.parametrize(
    ("shape", "dtype", "reason"),
    [
        (
            Shape("c8p-int4"),
            torch.float32,
            r"float32 rows; the kernels take bf16 and fp16: set --d",
        ),
        (Shape("c8p-int4", head_dim=80), torch.bfloat16, r"head dimension 80; .* multiples of 32"),
    ],
    ids=["dtype", "head dimension"],
)
def test_what_no_kernel_writes_is_refused(
    shape: Shape, dtype: torch.dtype, reason: str, device: torch.device
) -> None:
    rows = torch.zeros(3, 2, shape.head_dim, dtype=dtype, device=device)
    with pytest.raises(UnsupportedRequestError, match=reason):
        _write(shape, device, rows)


@pytest.mark.parametrize("cores", [0, -1, 49])
def test_impossible_cores_are_refused(cores: int, device: torch.device) -> None:
    shape = Shape("c8d")
    pages = torch.zeros(shape.planes.pages_shape(2), dtype=torch.int8, device=device)
    planes = page_planes(pages, shape.planes.plane_layout())
    rows = torch.zeros(3, 2, 128, dtype=torch.bfloat16, device=device)
    slots = torch.arange(3, device=device)
    if ascendc.cores_of(device).vector != 48:
        cores = min(cores, 0)
    with pytest.raises(ValueError, match=rf"on {cores} cores; this device has \d+\. Leave"):
        ascendc.write(rows, rows, planes, slots, ascendc.Int8Layer(Quantisation.C8D), cores)


def test_long_queries_and_wide_groups_have_a_reason() -> None:
    request = attention.FusedRequest(
        torch.bfloat16, Quantisation.C8P, 128, 2, 128, 128, max_query=5
    )
    assert "320 rows of a kv head" in attention.kernel_support(request).reason
    long = attention.FusedRequest(torch.bfloat16, Quantisation.C8P, 4, 2, 128, 128)
    assert "more than 16 query tokens" in attention.kernel_support(long).reason


def test_thresholds_go_with_patches(device: torch.device) -> None:
    rows = torch.zeros(3, 2, 128, dtype=torch.bfloat16, device=device)
    with pytest.raises(ValueError, match="c8p pages need two patch_thresholds"):
        _write(Shape("c8p-int4"), device, rows, patch_thresholds=[])


def test_a_layout_with_other_slots_is_refused(device: torch.device) -> None:
    shape = Shape("c8p-int4")
    rows = torch.zeros(3, 2, 128, dtype=torch.bfloat16, device=device)
    pages = torch.zeros(shape.planes.pages_shape(2), dtype=torch.int8, device=device)
    layout = shape.planes.plane_layout()._replace(patch_slots=8)
    with pytest.raises(ValueError, match=r"c8p pages have 16 patch slots .* the layout says 8"):
        kv_cache_write(
            rows,
            rows,
            pages,
            torch.arange(3, device=device),
            layout,
            channel_scales=shape.scales,
            patch_thresholds=shape.thresholds,
        )


def test_pages_without_quantisation_are_not_gathered(device: torch.device) -> None:
    page = PageFormat(torch.bfloat16, 128, 2, 128, arrangement=Arrangement.PLANE_MAJOR)
    pages = torch.zeros(page.pages_shape(2), dtype=torch.bfloat16, device=device)
    rows = torch.zeros(3, 2, 128, dtype=torch.bfloat16, device=device)
    one = torch.zeros(1, dtype=torch.int32, device=device)
    with pytest.raises(UnsupportedRequestError, match="which the fused attention reads"):
        kv_cache_gather(pages, one[None], one, one, rows, rows, page.plane_layout())
