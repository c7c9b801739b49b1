"""``kv_cache_gather``: what tokens of sequences mean, and what the operator refuses."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import int8_pages
import paging
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from int8_pages import VARIANTS, Int8
from strategies import BLOCK_SIZES, DTYPES, HEAD_DIMS

from ascend_plugin.kv_cache import PageFormat
from ascend_plugin.ops.kv_cache_gather import kv_cache_gather, operator
from ascend_plugin.ops.kv_cache_gather.reference import kv_cache_gather as reference
from ascend_plugin.ops.page_layout import Quantisation

BLOCKS = 5


@dataclass(frozen=True, slots=True)
class Gather:
    """What a call looks like."""

    variant: str = "c8d"  # or a float type of pages
    lengths: tuple[int, ...] = (20, 5)
    kv_heads: int = 2
    head_dim: int = 64
    block_size: int = 16
    dtype: torch.dtype = torch.bfloat16
    order: str = "LBHNC"
    seed: int = 0

    @property
    def page(self) -> PageFormat:
        shape = (self.block_size, self.kv_heads, self.head_dim)
        if self.variant in VARIANTS:
            return int8_pages.page_format(self.variant, *shape)
        return PageFormat(getattr(torch, self.variant), *shape)


@st.composite
def gathers(draw: st.DrawFn) -> Gather:
    size = draw(st.sampled_from(BLOCK_SIZES))
    return Gather(
        variant=draw(st.sampled_from((*VARIANTS, "float32", "float16", "bfloat16"))),
        lengths=tuple(draw(st.lists(st.integers(0, 2 * size), max_size=2))),
        kv_heads=draw(st.integers(1, 3)),
        head_dim=draw(st.sampled_from(HEAD_DIMS)),
        block_size=size,
        dtype=draw(st.sampled_from(DTYPES)),
        order=draw(st.sampled_from(paging.ORDERS)),
        seed=draw(st.integers(0, 2**16)),
    )


def _arguments(gather: Gather) -> dict[str, Any]:
    """Fill pages with tokens, and describe sequences of them; garbage behind their blocks."""
    page, generator = gather.page, torch.Generator().manual_seed(gather.seed)
    total = BLOCKS * gather.block_size
    scales = None
    if page.quantisation is Quantisation.NONE:
        pages = paging.make_pages(page, BLOCKS, gather.order)
        shape = (total, gather.kv_heads, gather.head_dim)
        rows = [torch.randn(shape, generator=generator) for _ in range(2)]
        paging.put(pages, page, torch.arange(total), *rows)
    else:
        int8 = Int8(page)
        pages = int8_pages.make_pages(page, BLOCKS, gather.order, gather.seed)
        int8_pages.write(pages, int8, torch.arange(total), *int8.rows(total, generator))
        scales = int8.channel_scales()
    table = torch.full((len(gather.lengths), 3), -(2**31), dtype=torch.int32)
    order = torch.randperm(BLOCKS, generator=generator).int()
    for i, length in enumerate(gather.lengths):
        count = -(-length // gather.block_size)
        table[i, :count] = order[2 * i : 2 * i + count]
    lengths = torch.tensor(gather.lengths, dtype=torch.int32)
    rows_shape = (sum(gather.lengths) + 3, gather.kv_heads, gather.head_dim)
    key = torch.full(rows_shape, torch.nan, dtype=gather.dtype)
    return {
        "pages": pages,
        "block_table": table,
        "seq_lens": lengths,
        "starts": (lengths.cumsum(0) - lengths + 2).int(),
        "key": key,
        "value": key.clone(),
        "layout": page.layout(),
        "channel_scales": scales,
    }


def _slots(gather: Gather, table: torch.Tensor, sequence: int) -> torch.Tensor:
    tokens = torch.arange(gather.lengths[sequence])
    blocks = table[sequence, tokens // gather.block_size].long()
    return blocks * gather.block_size + tokens % gather.block_size


def _expected(gather: Gather, given: dict[str, Any], slots: torch.Tensor) -> list[torch.Tensor]:
    """Read tokens byte by byte, float64."""
    page, pages = gather.page, given["pages"]
    if page.quantisation is Quantisation.NONE:
        flat = paging.storage(pages)
        return [flat[paging.element_index(pages, page, name, slots)].double() for name in "KV"]
    if not slots.numel():
        return [torch.empty(0, gather.kv_heads, gather.head_dim, dtype=torch.float64)] * 2
    return list(int8_pages.read(pages, Int8(page), slots))


def _check(gather: Gather) -> None:
    given = _arguments(gather)
    kv_cache_gather(**given)
    kept = torch.ones(given["key"].shape[0], dtype=torch.bool)
    for i, length in enumerate(gather.lengths):
        start = int(given["starts"][i])
        kept[start : start + length] = False
        wanted = _expected(gather, given, _slots(gather, given["block_table"], i))
        for got, want in zip((given["key"], given["value"]), wanted, strict=True):
            rows = got[start : start + length].double()
            # Rotating back adds up rounded terms as large as the row's largest.
            bound = want.abs().amax(-1, keepdim=True) * 2.0**-18 if length else want
            bound = bound + want.abs() * torch.finfo(gather.dtype).eps
            assert bool(((rows - want).abs() <= bound + 1e-7).all())
    for got in (given["key"], given["value"]):
        assert bool(got[kept].isnan().all()), "rows that no sequence owns were written"
        assert not bool(got[~kept].isnan().any())


@given(gather=gathers())
@settings(max_examples=60)
def test_any_gather_equals_the_formula(gather: Gather) -> None:
    _check(gather)


@pytest.mark.parametrize("variant", VARIANTS)
def test_unowned_tokens_are_not_read(variant: str) -> None:
    """A patch that names a token behind the sequence's last changes nothing."""
    gather = Gather(variant, lengths=(20,))
    given = _arguments(gather)
    kv_cache_gather(**given)
    before = given["key"].clone()
    page, block = gather.page, int(given["block_table"][0, 1])
    for head in range(gather.kv_heads):
        for plane in page.planes:
            array = int8_pages.array(given["pages"], page, block, head, plane.name)
            if plane.name in "KV":
                array[:, 4:] = 99
            elif plane.name.endswith(" scales") and "patch" not in plane.name:
                array[4:] = float("nan")
    given["key"].fill_(torch.nan)
    kv_cache_gather(**given)
    assert torch.equal(before.nan_to_num(7.0), given["key"].nan_to_num(7.0))


@pytest.mark.parametrize("variant", [*VARIANTS, "float16"])
def test_the_reference_agrees_with_float64(variant: str) -> None:
    gather = Gather(variant, dtype=torch.float32)
    single, double = _arguments(gather), _arguments(gather)
    for name in ("key", "value"):
        double[name] = double[name].double()
    kv_cache_gather(**single)
    reference(**double, compute_dtype=torch.float64)
    for name in ("key", "value"):
        kept = single[name].nan_to_num(0.0).double(), double[name].nan_to_num(0.0)
        torch.testing.assert_close(*kept, rtol=0, atol=1e-5)


def test_no_sequences() -> None:
    _check(Gather(lengths=()))
    _check(Gather(lengths=(0, 0)))


REFUSALS = {
    "pages dtype": (
        lambda a: a | {"pages": a["pages"].view(torch.uint8)},
        r"c8d pages hold int8, got torch.uint8",
    ),
    "key dtype": (
        lambda a: a | {"key": a["key"].int()},
        r"key has dtype torch.int32; allowed are float32, float16 and bfloat16",
    ),
    "key width": (
        lambda a: a | {"key": a["key"][..., :32].contiguous()},
        r"key must be \[tokens, heads, 64\]",
    ),
    "value heads": (
        lambda a: a | {"value": a["value"][:, :1].contiguous()},
        r"value has 1 kv heads, pages have 2",
    ),
    "value stride": (
        lambda a: a | {"value": a["value"].transpose(0, 1).contiguous().transpose(0, 1)},
        r"value must be contiguous, got strides .*; allocate it with torch.empty",
    ),
    "value dtype": (
        lambda a: a | {"value": a["value"].half()},
        r"key \(.*bfloat16\) and value \(.*float16\) must have the same shape and dtype",
    ),
    "value rows": (lambda a: a | {"value": a["value"][1:]}, r"must have the same shape and dtype"),
    "table dtype": (
        lambda a: a | {"block_table": a["block_table"].long()},
        r"block_table must be 2-dimensional torch.int32, got 2-dimensional torch.int64",
    ),
    "starts rank": (
        lambda a: a | {"starts": a["starts"][None]},
        r"starts must be 1-dimensional torch.int32",
    ),
    "sequences": (
        lambda a: a | {"seq_lens": a["seq_lens"][:1]},
        r"1 seq_lens need as many starts and rows of block_table, got 2 and 2",
    ),
    "too long": (
        lambda a: a | {"seq_lens": torch.tensor([49, 5], dtype=torch.int32)},
        r"seq_lens must lie within 0\.\.48, what 3 columns .* blocks of 16, got 49",
    ),
    "negative": (
        lambda a: a | {"seq_lens": torch.tensor([-1, 5], dtype=torch.int32)},
        r"seq_lens must lie within 0\.\.48, .* got -1",
    ),
    "rows": (
        lambda a: a | {"starts": torch.tensor([2, 24], dtype=torch.int32)},
        r"a sequence of 5 tokens does not fit at row 24 of key and value, which have 28",
    ),
    "block id": (
        lambda a: a | {"block_table": a["block_table"].clamp(max=0) + BLOCKS},
        r"block ids .* lie outside the pages, which hold 5 blocks",
    ),
    "scales": (
        lambda a: a | {"channel_scales": torch.ones(2, 2, 64)},
        r"c8d pages take no channel_scales",
    ),
}


@pytest.mark.parametrize("warm", [False, True], ids=["first call", "after a good call"])
@pytest.mark.parametrize("name", REFUSALS)
def test_refusals(name: str, warm: bool) -> None:
    replaced, message = REFUSALS[name]
    given = _arguments(Gather())
    operator.forget()
    if warm:  # what its signature lets later calls skip must not hide their faults
        kv_cache_gather(**given)
        given["key"].fill_(torch.nan)
        given["value"].fill_(torch.nan)
    with pytest.raises(ValueError, match=message):
        kv_cache_gather(**replaced(given))
    assert bool(given["key"].isnan().all()), "the refused call wrote something"


def test_the_dispatcher_gathers_the_same() -> None:
    direct, dispatched = _arguments(Gather()), _arguments(Gather())
    kv_cache_gather(**direct)
    torch.ops.ascend_plugin.kv_cache_gather(**dispatched)
    assert torch.equal(paging.bits(direct["key"]), paging.bits(dispatched["key"]))
    assert torch.equal(paging.bits(direct["value"]), paging.bits(dispatched["value"]))


@pytest.mark.parametrize("variant", ["c8d", "c8p-int4", "bfloat16"])
def test_opcheck(variant: str) -> None:
    given = _arguments(Gather(variant))
    given["key"].zero_()
    given["value"].zero_()
    given["layout"] = list(given["layout"])
    options = {"channel_scales": given.pop("channel_scales")}
    torch.library.opcheck(
        torch.ops.ascend_plugin.kv_cache_gather.default, tuple(given.values()), options
    )
