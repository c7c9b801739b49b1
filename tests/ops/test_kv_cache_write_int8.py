"""``kv_cache_write`` into int8 pages: every implementation byte for byte, and its counters."""

from __future__ import annotations

from dataclasses import dataclass, replace

import int8_pages
import paging
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from implementations import threads
from int8_pages import PATCHED, STATIC, VARIANTS, Int8
from strategies import BLOCK_SIZES, DTYPES, HEAD_DIMS

from ascend_plugin.ops.kv_cache_write import kv_cache_write
from ascend_plugin.ops.quantise import rotate

BLOCKS = 4


@dataclass(frozen=True, slots=True)
class Write:
    """What a call looks like."""

    variant: str = "c8d"
    tokens: int = 40
    kv_heads: int = 2
    head_dim: int = 64
    block_size: int = 16
    dtype: torch.dtype = torch.float32
    order: str = "LBHNC"
    strided: bool = False
    skipped: int = 0  # tokens with a negative slot
    unnamed: int = 0  # tokens beyond slot_mapping
    shuffled: bool = False
    outlier_share: float = 0.3
    seed: int = 0

    @property
    def int8(self) -> Int8:
        return Int8(
            int8_pages.page_format(self.variant, self.block_size, self.kv_heads, self.head_dim)
        )


@st.composite
def writes(draw: st.DrawFn) -> Write:
    return Write(
        variant=draw(st.sampled_from(tuple(VARIANTS))),
        tokens=draw(st.integers(0, 70)),
        kv_heads=draw(st.integers(1, 4)),
        head_dim=draw(st.sampled_from((*HEAD_DIMS, 48))),
        block_size=draw(st.sampled_from(BLOCK_SIZES)),
        dtype=draw(st.sampled_from(DTYPES)),
        order=draw(st.sampled_from(paging.ORDERS)),
        strided=draw(st.booleans()),
        skipped=draw(st.integers(0, 5)),
        unnamed=draw(st.integers(0, 5)),
        shuffled=draw(st.booleans()),
        outlier_share=draw(st.sampled_from((0.0, 0.1, 0.5, 1.0))),
        seed=draw(st.integers(0, 2**16)),
    )


Tensors = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def _tensors(write: Write) -> Tensors:
    """Draw key, value and slots; a fused projection makes key and value strided."""
    generator = torch.Generator().manual_seed(write.seed)
    slots = torch.randperm(BLOCKS * write.block_size, generator=generator)
    if not write.shuffled:
        slots = torch.arange(BLOCKS * write.block_size).roll(-write.seed)
    slots = slots[: write.tokens].clone()
    slots[torch.randperm(slots.numel(), generator=generator)[: write.skipped]] = -1
    key, value = write.int8.rows(slots.numel() + write.unnamed, generator)
    if write.strided:
        fused = torch.cat([torch.zeros_like(key), key, value], 1).to(write.dtype)
        return *fused[:, write.kv_heads :].chunk(2, 1), slots
    return key.to(write.dtype), value.to(write.dtype), slots


def _thresholds(write: Write, tensors: Tensors) -> Int8:
    """Choose thresholds that no row's error lies near: implementations may sum differently."""
    int8 = write.int8
    scales = int8.channel_scales()
    if not int8.patched or scales is None:
        return int8
    found = []
    for rows, channel in zip(tensors, scales, strict=False):
        x = rows.float()
        scaled = x * (1.0 / channel)
        difference = (scaled - scaled.round().clamp(-127, 127)) * channel
        pairs = zip(x.flatten(0, 1).numpy(), difference.flatten(0, 1).numpy(), strict=True)
        errors = sorted({0.0, *(int8_pages.error(*pair) for pair in pairs)})
        gaps = [
            (low + high) / 2
            for low, high in zip(errors, [*errors[1:], errors[-1] + 1], strict=True)
            if high - low > 1e-3 * high
        ]
        found.append(gaps[round((1 - write.outlier_share) * (len(gaps) - 1))])
    return replace(int8, thresholds=(found[0], found[1]))


def _check(write: Write, tensors: Tensors, int8: Int8 | None = None) -> list[int]:
    """Write into poisoned pages; all bytes that mean something must be the model's."""
    key, value, slots = tensors
    int8 = int8 or _thresholds(write, tensors)
    pages, expected = (
        int8_pages.make_pages(int8.page, BLOCKS, write.order, write.seed) for _ in range(2)
    )
    wanted = int8_pages.write(expected, int8, slots, key, value)
    counters = torch.full((4,), 7)
    kv_cache_write(
        key, value, pages, slots, int8.page.layout(), **int8.write_options(), counters=counters
    )
    assert (counters - 7).tolist() == wanted
    got, want = (int8_pages.comparable(each, int8.page) for each in (pages, expected))
    assert torch.equal(got, want), (got != want).nonzero().flatten()[:20].tolist()
    return wanted


@given(write=writes())
@settings(max_examples=100)
def test_any_write_equals_the_formula(implementation: str, write: Write) -> None:
    _check(write, _tensors(write))


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("head_dim", [*HEAD_DIMS, 48])
def test_head_dims(implementation: str, variant: str, head_dim: int) -> None:
    write = Write(variant, head_dim=head_dim, dtype=torch.bfloat16)
    counts = _check(write, _tensors(write))
    assert variant not in PATCHED or min(counts[2:]) > 0, "nothing tested"


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("block_size", range(16, 257, 48))
def test_block_sizes(implementation: str, variant: str, block_size: int) -> None:
    write = Write(variant, tokens=3 * block_size + 5, block_size=block_size, kv_heads=1, seed=11)
    _check(write, _tensors(write))


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("count", [1, 2, 5])
def test_thread_counts(implementation: str, variant: str, count: int) -> None:
    with threads(count):
        for tokens in (1, 2, 300):
            write = Write(variant, tokens=tokens, kv_heads=3, block_size=128)
            _check(write, _tensors(write))


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("block_size", [16, 128])
@pytest.mark.parametrize("shuffled", [False, True])
def test_threads_keep_the_order_within_a_block(
    implementation: str, variant: str, block_size: int, shuffled: bool
) -> None:
    """Blocks that are left and entered again, padding between, every row an outlier."""
    tokens = BLOCKS * block_size
    write = Write(
        variant, tokens, kv_heads=3, block_size=block_size, skipped=9, shuffled=shuffled, seed=5
    )
    key, value, slots = _tensors(write)
    slots = slots.view(2, -1).T.flatten()  # two blocks in turn
    with threads(2):
        _check(write, (key, value, slots), Int8(write.int8.page, (0.0, 0.0)))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("variant", VARIANTS)
def test_rows_that_are_not_finite(implementation: str, variant: str, dtype: torch.dtype) -> None:
    write = Write(variant, dtype=dtype, seed=1)
    key, value, slots = _tensors(write)
    key[0, 0, 5] = torch.nan
    key[1, 1, 63] = torch.inf
    value[2, 0, 0] = -torch.inf
    value[3, :, 1:3] = torch.tensor([torch.inf, torch.nan])
    key[4] = torch.nan
    int8 = Int8(write.int8.page)
    counts = _check(write, (key, value, slots), int8)
    if int8.static:
        assert counts[1] >= 7
    pages = int8_pages.make_pages(int8.page, BLOCKS)
    kv_cache_write(key, value, pages, slots, int8.page.layout(), **int8.write_options())
    got_key, got_value = int8_pages.read(pages, int8, slots)
    bad_rows = [got_key[0, 0], got_key[1, 1], got_value[2, 0], got_value[3, 0], got_key[4, 1]]
    for row in bad_rows:
        assert bool(row.isfinite().all()) == int8.static, "C8D shows a bad row, the others bound it"
    assert bool(got_key[5:].isfinite().all())


@pytest.mark.parametrize("variant", VARIANTS)
def test_rows_of_extreme_size(implementation: str, variant: str) -> None:
    """Zeros, subnormal numbers, scales at the edge of what has a reciprocal, the largest ones."""
    sizes = torch.tensor([0.0, 1e-45, 1e-40, 127 * 2.0**-126, 1e-30, 1e15, 3e38, -0.0])
    write = Write(variant, tokens=8)
    key, value, slots = _tensors(write)
    key, value = (rows.clamp(-1, 1) * sizes[:, None, None] for rows in (key, value))
    _check(write, (key, value, slots), Int8(write.int8.page, (0.5, 0.5)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_rotation_that_overflows(implementation: str, dtype: torch.dtype) -> None:
    """Sums leave the range and cancel: NaN beside finite numbers, and no infinity to show it."""
    write = Write("c8d", tokens=1, kv_heads=1, head_dim=128, dtype=dtype)
    key, value, slots = _tensors(write)
    key.zero_()
    key[..., ::16] = 2e38 * torch.tensor([1, 1, 1, 1, 1, 1, -1, -1], dtype=dtype)
    rotated = rotate(key.float())
    assert bool(rotated.isnan().any())
    assert not bool(rotated.isinf().any())
    assert bool(rotated.isfinite().any())
    _check(write, (key, value, slots), Int8(write.int8.page))


def test_codes_round_to_nearest_even_and_never_reach_minus_128(implementation: str) -> None:
    write = Write(tokens=1, kv_heads=1)
    row = torch.cat([torch.tensor([127.0, -127.0]), torch.arange(-31, 31) + 0.5]).view(1, 1, 64)
    slots = torch.tensor([3])
    _check(write, (row, -row, slots))
    pages = int8_pages.make_pages(write.int8.page, BLOCKS)
    kv_cache_write(row, row, pages, slots, write.int8.page.layout())
    _, value = int8_pages.read(pages, write.int8, slots)  # K's codes are those of a rotated row
    assert torch.equal(value, row.double().round())


@pytest.mark.parametrize("variant", PATCHED)
def test_saturation_is_counted_per_row(implementation: str, variant: str) -> None:
    for name in ("c8s", variant):
        write = Write(name, tokens=10)
        int8 = Int8(write.int8.page)
        scales = int8.channel_scales()
        assert scales is not None
        key, value = (torch.ones(10, 2, 1) * channel * 127 for channel in scales)
        key[3, 1, 7] *= 1.01
        value[4:6] *= -1.5
        counts = _check(write, (key, value, torch.arange(10)), int8)
        assert counts[:2] == [40, 5]


@pytest.mark.parametrize("variant", PATCHED)
@pytest.mark.parametrize("block_size", [16, 48, 128, 256])
def test_slots_that_collide_overflow(implementation: str, variant: str, block_size: int) -> None:
    """When every row is an outlier, the first tokens of a block take all slots."""
    write = Write(variant, tokens=2 * block_size, block_size=block_size)
    key, value, _ = _tensors(write)
    int8 = Int8(write.int8.page, (0.0, 0.0))
    slots = torch.arange(2 * block_size) + block_size
    counts = _check(write, (key, value, slots), int8)
    pools, taken = 2 * 2 * 2, int8.page.patch_slots
    assert counts[2:] == [pools * taken, pools * (block_size - taken)]


@pytest.mark.parametrize("variant", PATCHED)
def test_the_first_token_of_a_block_is_always_patched(implementation: str, variant: str) -> None:
    """Whatever the block held, and whatever order the call names tokens in."""
    write = Write(variant, tokens=32)
    key, value, _ = _tensors(write)
    key[0] = value[0] = 10.0
    int8 = Int8(write.int8.page)
    pages = int8_pages.make_pages(int8.page, BLOCKS)
    for slots in (torch.arange(32), torch.arange(32).flip(0)):
        for _ in range(2):
            kv_cache_write(
                key[slots], value[slots], pages, slots, int8.page.layout(), **int8.write_options()
            )
            for head in range(2):
                for name in ("K patch tags", "V patch tags"):
                    assert int8_pages.array(pages, int8.page, 0, head, name)[0] == 1


def test_padding_and_empty_calls_write_nothing(implementation: str) -> None:
    for variant in VARIANTS:
        write = Write(variant)
        key, value, slots = _tensors(write)
        for padding in (torch.full_like(slots, -1), torch.full_like(slots, -(2**62)), slots[:0]):
            assert _check(write, (key, value, padding)) == [0, 0, 0, 0]
        assert _check(write, (key[:0], value[:0], slots[:0]), write.int8) == [0, 0, 0, 0]


def test_counters_are_optional(implementation: str) -> None:
    for variant in VARIANTS:
        write = Write(variant)
        key, value, slots = _tensors(write)
        options = write.int8.write_options()
        pages, counted = (int8_pages.make_pages(write.int8.page, BLOCKS) for _ in range(2))
        layout = write.int8.page.layout()
        kv_cache_write(key, value, pages, slots, layout, **options)
        kv_cache_write(
            key, value, counted, slots, layout, **options, counters=torch.zeros(4).long()
        )
        assert torch.equal(pages, counted)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("bad", [BLOCKS * 16, 2**31, 2**62])
def test_slots_beyond_the_pages_are_refused(implementation: str, variant: str, bad: int) -> None:
    write = Write(variant, tokens=20)
    key, value, slots = _tensors(write)
    slots[13] = bad
    pages = int8_pages.make_pages(write.int8.page, BLOCKS)
    before, counters = paging.storage(pages).clone(), torch.zeros(4).long()
    with pytest.raises(ValueError, match=r"slot.* 64"):
        kv_cache_write(
            key,
            value,
            pages,
            slots,
            write.int8.page.layout(),
            **write.int8.write_options(),
            counters=counters,
        )
    assert torch.equal(paging.storage(pages), before), "the refused call wrote something"
    assert counters.tolist() == [0, 0, 0, 0]


@pytest.mark.parametrize("variant", VARIANTS)
def test_through_the_dispatcher_and_compiled(implementation: str, variant: str) -> None:
    write = Write(variant, skipped=2)
    key, value, slots = _tensors(write)
    int8, results = write.int8, []
    compiled = torch.compile(kv_cache_write)
    for call in (kv_cache_write, torch.ops.ascend_plugin.kv_cache_write, compiled):
        pages = int8_pages.make_pages(int8.page, BLOCKS)
        counters = torch.zeros(4, dtype=torch.int64)
        layout, options = int8.page.layout(), int8.write_options()
        call(key, value, pages, slots, layout, **options, counters=counters)
        results.append((int8_pages.comparable(pages, int8.page), counters))
    for pages, counters in results[1:]:
        assert torch.equal(pages, results[0][0])
        assert torch.equal(counters, results[0][1])
        assert int(counters[0]) == 4 * 38


@pytest.mark.parametrize("counted", [False, True])
@pytest.mark.parametrize("variant", VARIANTS)
def test_opcheck(implementation: str, variant: str, counted: bool) -> None:
    write = Write(variant, order="BLHNC", strided=True, skipped=2, unnamed=1)
    key, value, slots = _tensors(write)
    pages = int8_pages.make_pages(write.int8.page, BLOCKS, write.order)
    # NaN is no obstacle to the operator, but opcheck compares with ==.
    paging.storage(pages).zero_()
    counters = torch.zeros(4, dtype=torch.int64) if counted else None
    torch.library.opcheck(
        torch.ops.ascend_plugin.kv_cache_write.default,
        (key, value, pages, slots, list(write.int8.page.layout())),
        write.int8.write_options() | {"counters": counters},
    )


@pytest.mark.parametrize("variant", STATIC)
def test_a_second_layer_has_scales_of_its_own(implementation: str, variant: str) -> None:
    """What is kept per signature must not keep the scales of the first call."""
    write = Write(variant)
    key, value, slots = _tensors(write)
    int8 = Int8(write.int8.page)
    scales = int8.channel_scales()
    assert scales is not None
    pages = int8_pages.make_pages(int8.page, BLOCKS)
    options = int8.write_options()
    kv_cache_write(key, value, pages, slots, int8.page.layout(), **options)
    first, _ = int8_pages.read(pages, int8, slots)
    options["channel_scales"] = scales * 2
    kv_cache_write(key * 2, value * 2, pages, slots, int8.page.layout(), **options)
    second, _ = int8_pages.read(pages, int8, slots)  # in units of the first layer's scales
    assert torch.equal(first, second)
