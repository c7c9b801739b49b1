"""``kv_cache_write``: every implementation bit for bit, and what it refuses."""

from __future__ import annotations

from dataclasses import dataclass

import paging
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from implementations import threads
from strategies import BLOCK_SIZES, DTYPES, HEAD_DIMS

from ascend_plugin.kv_cache import PageFormat
from ascend_plugin.ops.kv_cache_write import kv_cache_write, operator

BLOCKS = 5


@dataclass(frozen=True, slots=True)
class Write:
    """What a call looks like."""

    tokens: int = 20
    kv_heads: int = 2
    head_dim: int = 64
    block_size: int = 16
    dtype: torch.dtype = torch.float32
    page_dtype: torch.dtype = torch.float32
    order: str = "LBHNC"
    strided: bool = False
    skipped: int = 0  # tokens with a negative slot
    unnamed: int = 0  # tokens beyond slot_mapping
    seed: int = 0

    @property
    def page(self) -> PageFormat:
        return PageFormat(self.page_dtype, self.block_size, self.kv_heads, self.head_dim)


@st.composite
def writes(draw: st.DrawFn) -> Write:
    return Write(
        tokens=draw(st.integers(0, 70)),
        kv_heads=draw(st.integers(1, 8)),
        head_dim=draw(st.sampled_from(HEAD_DIMS)),
        block_size=draw(st.sampled_from(BLOCK_SIZES)),
        dtype=draw(st.sampled_from(DTYPES)),
        page_dtype=draw(st.sampled_from(DTYPES)),
        order=draw(st.sampled_from(paging.ORDERS)),
        strided=draw(st.booleans()),
        skipped=draw(st.integers(0, 5)),
        unnamed=draw(st.integers(0, 5)),
        seed=draw(st.integers(0, 2**16)),
    )


def _tensors(write: Write) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Draw key, value and slots; a fused projection makes key and value strided."""
    generator = torch.Generator().manual_seed(write.seed)
    named = min(write.tokens, BLOCKS * write.block_size)
    slots = torch.randperm(BLOCKS * write.block_size, generator=generator)[:named]
    slots[torch.randperm(named, generator=generator)[: write.skipped]] = -1
    shape = (named + write.unnamed, 2 * write.kv_heads + 4, write.head_dim)
    fused = (torch.randn(shape, generator=generator) * 3).to(write.dtype)
    key, value = fused[:, 4 : 4 + write.kv_heads], fused[:, 4 + write.kv_heads :]
    if not write.strided:
        key, value = key.contiguous(), value.contiguous()
    return key, value, slots


def _check(write: Write, key: torch.Tensor, value: torch.Tensor, slots: torch.Tensor) -> None:
    """Write into poisoned pages; everything else in their memory must keep its bits."""
    pages = paging.make_pages(write.page, BLOCKS, write.order)
    expected = paging.make_pages(write.page, BLOCKS, write.order)
    kept = slots >= 0
    tokens = slots.shape[0]
    paging.put(expected, write.page, slots[kept], key[:tokens][kept], value[:tokens][kept])
    kv_cache_write(key, value, pages, slots, write.page.layout())
    got, want = paging.storage(pages), paging.storage(expected)
    numbers = ~want.isnan()
    assert torch.equal(got.isnan(), ~numbers)
    assert torch.equal(paging.bits(got[numbers]), paging.bits(want[numbers]))


@given(write=writes())
@settings(max_examples=150)
def test_any_write_equals_the_formula(implementation: str, write: Write) -> None:
    _check(write, *_tensors(write))


@pytest.mark.parametrize("page_dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_conversion_rounds_to_nearest_even(
    implementation: str, dtype: torch.dtype, page_dtype: torch.dtype
) -> None:
    generator = torch.Generator().manual_seed(3)
    # Every sign and exponent, ties of both narrow types, subnormal numbers, infinities and NaN.
    words = torch.randint(-(2**31), 2**31 - 1, (40, 2, 64), generator=generator)
    ties = (words >> 12 << 12) | (1 << 12) | torch.randint(0, 2, words.shape, generator=generator)
    coarse = (words >> 16 << 16) | (1 << 15)
    special = torch.tensor([0.0, -0.0, torch.inf, -torch.inf, torch.nan, 65519.9, 65520.0, 6e-8])
    for values in (words, ties, coarse):
        key = values.to(torch.int32).view(torch.float32).to(dtype)
        value = special.repeat(40, 2, 8).to(dtype)
        write = Write(dtype=dtype, page_dtype=page_dtype)
        _check(write, key, value, torch.arange(40) + 16)


def test_reused_slots_keep_only_the_last_write(implementation: str) -> None:
    write = Write(tokens=30)
    pages = paging.make_pages(write.page, BLOCKS)
    expected = paging.make_pages(write.page, BLOCKS)
    for seed in range(3):
        key, value, _ = _tensors(Write(tokens=30, seed=seed))
        slots = torch.arange(30).roll(seed) + 7
        kv_cache_write(key, value, pages, slots, write.page.layout())
        paging.put(expected, write.page, slots, key, value)
    assert torch.equal(*(paging.bits(paging.storage(p)) for p in (pages, expected)))


@pytest.mark.parametrize("count", [1, 2, 5])
def test_thread_counts(implementation: str, count: int) -> None:
    with threads(count):
        for tokens in (1, 2, 300):
            write = Write(tokens=tokens, kv_heads=3, block_size=128)
            _check(write, *_tensors(write))


def test_nothing_but_pages_changes(implementation: str) -> None:
    write = Write(strided=True, skipped=3)
    tensors = _tensors(write)
    before = [paging.storage(tensor).clone() for tensor in tensors]
    pages = paging.make_pages(write.page, BLOCKS)
    kv_cache_write(tensors[0], tensors[1], pages, tensors[2], write.page.layout())
    for tensor, old in zip(tensors, before, strict=True):
        assert torch.equal(paging.storage(tensor), old)


def test_padding_alone_writes_nothing(implementation: str) -> None:
    write = Write()
    key, value, slots = _tensors(write)
    for padding in (torch.full_like(slots, -1), torch.full_like(slots, -(2**62)), slots[:0]):
        _check(write, key, value, padding)


@pytest.mark.parametrize("bad", [BLOCKS * 16, 2**31, 2**62])
@pytest.mark.parametrize("where", [0, 19])
def test_slots_beyond_the_pages_are_refused(implementation: str, bad: int, where: int) -> None:
    write = Write()
    key, value, slots = _tensors(write)
    slots[where] = bad
    pages = paging.make_pages(write.page, BLOCKS, fill=5.0)
    with pytest.raises(ValueError, match=r"slot.* 80"):
        kv_cache_write(key, value, pages, slots, write.page.layout())
    assert bool((paging.storage(pages) == 5.0).all()), "the refused call wrote something"


REFUSALS = {
    "pages dtype": (
        lambda a: a | {"pages": a["pages"].double()},
        r"a page without quantisation has dtype torch.float64; allowed are float32, float16 and",
    ),
    "key dtype": (lambda a: a | {"key": a["key"].to(torch.int8)}, r"key has dtype torch.int8"),
    "value dtype": (
        lambda a: a | {"value": a["value"].half()},
        r"key \(\[20, 2, 64\], torch.float32\) and value \(\[20, 2, 64\], torch.float16\) must "
        r"have the same shape and dtype",
    ),
    "value shape": (lambda a: a | {"value": a["value"][1:]}, r"must have the same shape and dtype"),
    "key width": (
        lambda a: a | {"key": a["key"][..., :16]},
        r"key must be \[tokens, heads, 64\] \(the page's head dimension\), got \[20, 2, 16\]",
    ),
    "value stride": (
        lambda a: a | {"value": a["value"].repeat_interleave(2, -1)[..., ::2]},
        r"value must be contiguous in its last dimension; call \.contiguous\(\)",
    ),
    "heads": (
        lambda a: a | {"key": a["key"][:, :1], "value": a["value"][:, :1]},
        r"key has 1 kv heads, pages have 2",
    ),
    "slots dtype": (
        lambda a: a | {"slot_mapping": a["slot_mapping"].int()},
        r"slot_mapping must be 1-dimensional torch.int64, got 1-dimensional torch.int32",
    ),
    "slots rank": (
        lambda a: a | {"slot_mapping": a["slot_mapping"][None]},
        r"slot_mapping must be 1-dimensional torch.int64, got 2-dimensional torch.int64",
    ),
    "slots stride": (
        lambda a: a | {"slot_mapping": a["slot_mapping"].repeat_interleave(2)[::2]},
        r"slot_mapping must be contiguous in its last dimension; call \.contiguous\(\)",
    ),
    "too many slots": (
        lambda a: a | {"key": a["key"][:7], "value": a["value"][:7]},
        r"slot_mapping names 20 tokens, key has 7",
    ),
    "run bytes": (
        lambda a: a | {"pages": a["pages"].half()},
        r"a \(block, kv head\) of pages holds 4096 bytes, its layout says 8192",
    ),
    "pages order": (
        lambda a: a | {"pages": a["pages"].transpose(1, 2).contiguous().transpose(1, 2)},
        r"pages must be contiguous within a \(block, kv head\).*Unset VLLM_KV_CACHE_LAYOUT",
    ),
}


@pytest.mark.parametrize("warm", [False, True], ids=["first call", "after a good call"])
@pytest.mark.parametrize("name", REFUSALS)
def test_refusals(name: str, warm: bool) -> None:
    replaced, message = REFUSALS[name]
    write = Write()
    key, value, slots = _tensors(write)
    pages = paging.make_pages(write.page, BLOCKS, fill=5.0)
    operator.forget()
    if warm:  # what its signature lets later calls skip must not hide their faults
        kv_cache_write(key, value, pages, slots, write.page.layout())
        paging.storage(pages).fill_(5.0)
    arguments = {"key": key, "value": value, "pages": pages, "slot_mapping": slots}
    with pytest.raises(ValueError, match=message):
        kv_cache_write(**replaced(arguments), layout=write.page.layout())
    assert bool((paging.storage(pages) == 5.0).all())


def test_the_dispatcher_writes_the_same(implementation: str) -> None:
    write = Write(skipped=2)
    key, value, slots = _tensors(write)
    direct, dispatched = (paging.make_pages(write.page, BLOCKS) for _ in range(2))
    kv_cache_write(key, value, direct, slots, write.page.layout())
    torch.ops.ascend_plugin.kv_cache_write(key, value, dispatched, slots, write.page.layout())
    assert torch.equal(*(paging.bits(paging.storage(p)) for p in (direct, dispatched)))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_opcheck(implementation: str, dtype: torch.dtype) -> None:
    write = Write(dtype=dtype, order="BLHNC", strided=True, skipped=2, unnamed=1)
    key, value, slots = _tensors(write)
    pages = paging.make_pages(write.page, BLOCKS, write.order, fill=0.0)
    torch.library.opcheck(
        torch.ops.ascend_plugin.kv_cache_write.default,
        (key, value, pages, slots, list(write.page.layout())),
    )
