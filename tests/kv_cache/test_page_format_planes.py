"""``PageFormat`` arranged by planes, as the NPU's fused operators read pages."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ascend_plugin.kv_cache import PageFormat, Region
from ascend_plugin.ops.npu.planes import page_planes
from ascend_plugin.ops.page_layout import Arrangement, PatchCode, Quantisation

NONE, C8D, C8S, C8P = Quantisation


def _format(dtype: torch.dtype, block: int, heads: int, dim: int, kind: Quantisation) -> PageFormat:
    return PageFormat(dtype, block, heads, dim, kind, PatchCode.INT4, Arrangement.PLANE_MAJOR)


@st.composite
def formats(draw: st.DrawFn) -> PageFormat:
    kind = draw(st.sampled_from(tuple(Quantisation)))
    floats = (torch.bfloat16, torch.float16)
    dtype = draw(st.sampled_from(floats)) if kind is NONE else torch.int8
    sizes = draw(st.sampled_from((16, 64, 128, 256))), draw(st.integers(1, 9))
    return _format(dtype, *sizes, draw(st.sampled_from((16, 64, 80, 128))), kind)


def test_a_worked_example() -> None:
    page = _format(torch.bfloat16, 128, 8, 64, NONE)
    assert page.page_bytes == 8 * 128 * 2 * 64 * 2
    assert page.token_bytes == 256
    assert page.plane_layout() == (128, 64, 8, 0, 0, 0)
    assert page.regions(10) == (Region(0, 262144, 262144),)
    key, value = page.planes
    assert (key.offset, key.nbytes, key.shape) == (0, 131072, (8, 4, 128, 16))
    assert (value.offset, value.nbytes, value.shape) == (131072, 131072, key.shape)


def test_scales_are_a_region_behind_all_pages() -> None:
    page = _format(torch.int8, 128, 2, 128, C8D)
    assert page.token_bytes == 2 * 128 + 8
    pages, scales = page.regions(10)
    assert pages == Region(0, 65536, 65536)
    assert scales == Region(655360, 2048, 2048)
    assert [plane.region for plane in page.planes] == [0, 0, 1, 1]
    assert page.plane("V scales").offset == 1024


@given(page=formats(), blocks=st.integers(0, 5))
def test_regions_cover_every_byte_once(page: PageFormat, blocks: int) -> None:
    owned = sorted(
        (region.offset + block * region.stride, region.nbytes)
        for region in page.regions(blocks)
        for block in range(blocks)
    )
    end = 0
    for start, nbytes in owned:
        assert start == end
        end += nbytes
    elements = torch.Size(page.pages_shape(blocks)).numel()
    assert end == elements * page.dtype.itemsize == blocks * page.page_bytes


@given(page=formats())
def test_planes_fill_their_regions_without_gap(page: PageFormat) -> None:
    ends = [0] * len(page.regions(1))
    for plane in page.planes:
        assert plane.offset == ends[plane.region]
        assert plane.nbytes == torch.Size(plane.shape).numel() * plane.dtype.itemsize
        ends[plane.region] += plane.nbytes
    assert [region.nbytes for region in page.regions(1)] == ends
    # Behind any number of blocks, scales start at a whole element.
    assert all(region.nbytes % 4 == 0 for region in page.regions(1))


def test_patches_are_a_region_behind_all_pages() -> None:
    page = _format(torch.int8, 128, 2, 128, C8P)
    # A pool: 16 slots of a tag (2), a scale (4) and 64 bytes of codes, and 32 zeros.
    assert page.plane("K patches").nbytes == 2 * 1152
    assert page.plane("V patches").offset == 2304
    assert page.regions(10) == (Region(0, 65536, 65536), Region(655360, 4608, 4608))
    assert page.plane_layout() == (128, 128, 2, C8P, PatchCode.INT4, 16)
    assert page.plane_layout().pool_bytes == 1152


#: Bytes per token and kv head: (head dimension, block size, variant).
TOKEN_BYTES = {
    (128, 128, C8P): 274,
    (128, 16, C8P): 274,
    (64, 128, C8P): 138,
    (80, 64, C8P): 206,
    (256, 256, C8P): 546,
    (128, 16, C8D): 264,
    (80, 128, C8S): 192,
}


@pytest.mark.parametrize(("shape", "wanted"), TOKEN_BYTES.items(), ids=str)
def test_bytes_of_a_token(shape: tuple[int, int, Quantisation], wanted: int) -> None:
    head_dim, block, kind = shape
    page = _format(torch.int8, block, 3, head_dim, kind)
    assert page.token_bytes == wanted
    assert page.pages_shape(7) == (7, 3, block, wanted)


@given(page=formats())
def test_views_are_the_planes_of_the_format(page: PageFormat) -> None:
    blocks = 3
    raw = torch.arange(blocks * page.page_bytes, dtype=torch.int32).to(torch.uint8)
    pages = raw.view(page.dtype).view(page.pages_shape(blocks))
    views = page_planes(pages, page.plane_layout())
    assert views.num_blocks == blocks
    regions = page.regions(blocks)
    extras = views.extras
    assert (extras is None) == (len(regions) == 1)
    for plane in page.planes:
        at = regions[plane.region].offset + 2 * regions[plane.region].stride + plane.offset
        which = 4 + plane.name.startswith("V")
        if extras is not None and plane.region:
            found = extras[which]
        else:
            found = (views.key if which == 4 else views.value)[4]
        assert found.shape == plane.shape
        assert found.data_ptr() == raw.data_ptr() + at


def test_each_arrangement_has_its_own_layout() -> None:
    with pytest.raises(ValueError, match=r"use plane_layout\(\)"):
        _format(torch.bfloat16, 128, 2, 128, NONE).layout()
    with pytest.raises(ValueError, match=r"use layout\(\)"):
        PageFormat(torch.bfloat16, 128, 2, 128).plane_layout()
