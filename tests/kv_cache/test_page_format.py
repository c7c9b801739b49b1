"""``PageFormat``: bytes, offsets and regions, by themselves and against vLLM's accounting."""

from __future__ import annotations

import dataclasses

import paging
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import BLOCK_SIZES, DTYPES, HEAD_DIMS

from ascend_plugin.kv_cache import PageFormat, Region
from ascend_plugin.ops.kv_cache_write import kv_cache_write


@st.composite
def formats(draw: st.DrawFn) -> PageFormat:
    return PageFormat(
        draw(st.sampled_from(DTYPES)),
        draw(st.sampled_from(BLOCK_SIZES)),
        draw(st.integers(1, 9)),
        draw(st.sampled_from(HEAD_DIMS)),
    )


def test_a_worked_example() -> None:
    page = PageFormat(torch.bfloat16, block_size=128, num_kv_heads=8, head_dim=64)
    assert page.column_group == 16
    assert page.run_bytes == 2 * 128 * 64 * 2
    assert page.token_bytes == 256
    assert page.page_bytes == 8 * 32768
    assert page.layout() == (128, 64, 0, 16384, 32768, 0, 0, 0, 0, 0, 0, 0)
    assert page.pages_shape(10) == (10, 8, 128, 128)
    assert page.regions(10) == (Region(offset=0, stride=262144, nbytes=262144),)
    key, value = page.planes
    assert (key.name, key.offset, key.nbytes, key.shape) == ("K", 0, 16384, (4, 128, 16))
    assert (value.name, value.offset, value.nbytes, value.shape) == ("V", 16384, 16384, key.shape)


@given(page=formats())
def test_planes_fill_a_run_without_gap_or_overlap(page: PageFormat) -> None:
    end = 0
    for plane in page.planes:
        assert plane.offset == end
        assert plane.nbytes == torch.Size(plane.shape).numel() * plane.dtype.itemsize
        assert plane.offset % 4 == 0
        end += plane.nbytes
    assert end == page.run_bytes
    assert page.column_group * page.dtype.itemsize == 32
    layout = page.layout()
    assert (layout.k_offset, layout.v_offset) == tuple(p.offset for p in page.planes)
    assert (layout.block_size, layout.head_dim) == (page.block_size, page.head_dim)
    assert layout.run_bytes * page.num_kv_heads == page.page_bytes


@given(page=formats(), blocks=st.integers(0, 5))
def test_shape_and_regions_cover_every_byte(page: PageFormat, blocks: int) -> None:
    elements = torch.Size(page.pages_shape(blocks)).numel()
    assert elements * page.dtype.itemsize == blocks * page.page_bytes
    owned = [
        (region.offset + block * region.stride, region.nbytes)
        for region in page.regions(blocks)
        for block in range(blocks)
    ]
    end = 0
    for start, nbytes in sorted(owned):
        assert start == end
        end += nbytes
    assert end == blocks * page.page_bytes


def test_moving_a_region_moves_the_block() -> None:
    page = PageFormat(torch.bfloat16, 32, 2, 80)
    pages = torch.zeros(page.pages_shape(4), dtype=page.dtype)
    generator = torch.Generator().manual_seed(0)
    key, value = torch.randn((2, 32, 2, 80), generator=generator).to(page.dtype)
    kv_cache_write(key, value, pages, torch.arange(32) + 32, page.layout())
    (region,) = page.regions(4)
    raw = pages.view(torch.uint8).flatten()
    source, target = (region.offset + block * region.stride for block in (1, 3))
    raw[target : target + region.nbytes] = raw[source : source + region.nbytes]
    expected = torch.zeros_like(pages)
    for first in (32, 96):
        paging.put(expected, page, torch.arange(32) + first, key, value)
    assert torch.equal(pages, expected)


@pytest.mark.parametrize(
    ("replaced", "message"),
    [
        ({"dtype": torch.int8}, "a page without quantisation has dtype torch.int8; allowed"),
        ({"dtype": torch.float64}, "a page without quantisation has dtype torch.float64"),
        ({"block_size": 8}, "block size 8 is not supported; allowed are multiples of 16 up to 256"),
        ({"block_size": 0}, "block size 0 is not supported"),
        ({"block_size": -16}, "block size -16 is not supported"),
        ({"block_size": 512}, "block size 512 is not supported.*Change --block-size"),
        ({"head_dim": 8}, "head dimension 8 is not supported; allowed are multiples of 16 up to"),
        ({"head_dim": 512}, "head dimension 512 .*Use --attention-backend CPU_ATTN"),
        ({"num_kv_heads": 0}, "a page needs at least one kv head, got 0"),
    ],
    ids=str,
)
def test_refusals(replaced: dict, message: str) -> None:
    page = PageFormat(torch.bfloat16, 16, 2, 64)
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(page, **replaced)


def test_a_negative_number_of_blocks_is_refused() -> None:
    with pytest.raises(ValueError, match="num_blocks=-1 must not be negative"):
        PageFormat(torch.bfloat16, 16, 2, 64).regions(-1)


def test_a_format_cannot_be_changed() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        PageFormat(torch.bfloat16, 16, 2, 64).block_size = 32
