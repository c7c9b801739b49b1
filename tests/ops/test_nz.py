"""NZ order: the formula, and the way back."""

from __future__ import annotations

import int8_pages
import paging
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from int8_pages import VARIANTS
from strategies import BLOCK_SIZES, DTYPES, HEAD_DIMS

from ascend_plugin.kv_cache import PageFormat
from ascend_plugin.ops import nz
from ascend_plugin.ops.page_layout import column_group


def _matrix(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """Distinct values in every type: the bits of a counter."""
    count = torch.Size(shape).numel()
    integers = {1: torch.int8, 2: torch.int16, 4: torch.int32}[dtype.itemsize]
    return torch.arange(count).to(integers).view(dtype).reshape(shape)


@given(
    dtype=st.sampled_from((*DTYPES, torch.int8)),
    leading=st.lists(st.integers(1, 3), max_size=2),
    rows=st.integers(0, 40),
    groups=st.integers(1, 6),
)
def test_round_trip(dtype: torch.dtype, leading: list[int], rows: int, groups: int) -> None:
    c0 = column_group(dtype.itemsize)
    matrix = _matrix((*leading, rows, groups * c0), dtype)
    fractals = nz.to_nz(matrix)
    assert fractals.shape == (*leading, groups, rows, c0)
    assert fractals.is_contiguous()
    back = nz.from_nz(fractals)
    assert back.is_contiguous()
    assert torch.equal(back.view(torch.int8), matrix.view(torch.int8))


@pytest.mark.parametrize("dtype", [*DTYPES, torch.int8], ids=str)
def test_element_positions(dtype: torch.dtype) -> None:
    rows, columns, c0 = 5, 64, 32 // dtype.itemsize
    matrix = _matrix((rows, columns), dtype)
    integers = {1: torch.int8, 2: torch.int16, 4: torch.int32}[dtype.itemsize]
    flat, matrix = nz.to_nz(matrix).flatten().view(integers), matrix.view(integers)
    for row in range(rows):
        for column in range(columns):
            position = (column // c0) * rows * c0 + row * c0 + column % c0
            assert flat[position] == matrix[row, column]


@pytest.mark.parametrize(("itemsize", "elements"), [(1, 32), (2, 16), (4, 8)])
def test_column_group_is_32_bytes(itemsize: int, elements: int) -> None:
    assert column_group(itemsize) == elements


@given(
    dtype=st.sampled_from(DTYPES),
    block_size=st.sampled_from(BLOCK_SIZES),
    head_dim=st.sampled_from(HEAD_DIMS),
    order=st.sampled_from(paging.ORDERS),
)
def test_page_planes_are_views_of_the_pages(
    dtype: torch.dtype, block_size: int, head_dim: int, order: str
) -> None:
    page = PageFormat(dtype, block_size, 2, head_dim)
    pages = paging.make_pages(page, 3, order, fill=0.0)
    slots = torch.tensor([0, block_size - 1, block_size, 3 * block_size - 1])
    generator = torch.Generator().manual_seed(0)
    key, value = torch.randn((2, 4, 2, head_dim), generator=generator).to(dtype)
    paging.put(pages, page, slots, key, value)
    for plane, tokens in zip(nz.page_planes(pages, page.layout()), (key, value), strict=True):
        assert plane.untyped_storage().data_ptr() == pages.untyped_storage().data_ptr()
        nd = nz.from_nz(plane).transpose(1, 2).flatten(0, 1)  # [slots, kv_heads, head_dim]
        assert torch.equal(nd[slots], tokens)
        assert int(nd.count_nonzero()) == int(tokens.count_nonzero())


@given(
    variant=st.sampled_from(tuple(VARIANTS)),
    block_size=st.sampled_from(BLOCK_SIZES),
    head_dim=st.sampled_from((*HEAD_DIMS, 48)),
    order=st.sampled_from(paging.ORDERS),
)
def test_every_array_of_an_int8_page_is_a_view(
    variant: str, block_size: int, head_dim: int, order: str
) -> None:
    page = int8_pages.page_format(variant, block_size, 2, head_dim)
    pages, layout = int8_pages.make_pages(page, 3, order), page.layout()
    views = dict(zip("KV", nz.page_planes(pages, layout), strict=True))
    if variant == "c8d":
        views |= zip(("K scales", "V scales"), nz.page_scales(pages, layout), strict=True)
    if page.patch_slots:
        for name, pool in zip("KV", nz.page_patches(pages, layout), strict=True):
            views |= {f"{name} patch {part}": each for part, each in pool._asdict().items()}
    assert sorted(views) == sorted(plane.name for plane in page.planes)
    for name, view in views.items():
        for block in range(3):
            for head in range(2):
                there = view[block, head]
                assert tuple(there.shape) == page.plane(name).shape
                assert there.dtype == page.plane(name).dtype
                there.zero_()  # writes through
                there += 1
                assert (int8_pages.array(pages, page, block, head, name) == 1).all()
    around = paging.storage(pages).count_nonzero() - pages.count_nonzero()
    before = int8_pages.make_pages(page, 3, order)
    assert around == paging.storage(before).count_nonzero() - before.count_nonzero()
