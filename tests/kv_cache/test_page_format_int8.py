"""Int8 pages: bytes, offsets and capacity, to the byte."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import int8_pages
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from int8_pages import PATCHED, VARIANTS, Int8
from strategies import BLOCK_SIZES, HEAD_DIMS

from ascend_plugin.kv_cache import PageFormat
from ascend_plugin.ops.kv_cache_write import kv_cache_write
from ascend_plugin.ops.page_layout import PatchCode, Quantisation

GIB = 2**30

#: Variant: (name, offset, bytes) of every array, bytes used, bytes of the run. Head dimension 128,
#: block 128, as docs/pages.md draws it.
BYTE_MAPS = {
    "c8d": (
        (("K", 0, 16384), ("V", 16384, 16384), ("K scales", 32768, 512), ("V scales", 33280, 512)),
        33792,
        33792,
    ),
    "c8s": ((("K", 0, 16384), ("V", 16384, 16384)), 32768, 32768),
    "c8p-int4": (
        (
            ("K", 0, 16384),
            ("V", 16384, 16384),
            ("K patch tags", 32768, 32),
            ("K patch scales", 32800, 64),
            ("K patch codes", 32864, 1024),
            ("V patch tags", 33888, 32),
            ("V patch scales", 33920, 64),
            ("V patch codes", 33984, 1024),
        ),
        35008,
        35072,
    ),
}
BYTE_MAPS["c8p-e3m0"] = BYTE_MAPS["c8p-int4"]


@st.composite
def formats(draw: st.DrawFn) -> PageFormat:
    return int8_pages.page_format(
        draw(st.sampled_from(tuple(VARIANTS))),
        draw(st.sampled_from(BLOCK_SIZES)),
        draw(st.integers(1, 9)),
        draw(st.sampled_from((*HEAD_DIMS, 48))),
    )


def tokens_per_gib(page: PageFormat) -> int:
    return GIB // page.page_bytes * page.block_size


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_byte_map_of_the_documentation(variant: str) -> None:
    page = int8_pages.page_format(variant, 128, 8, 128)
    arrays, used, run = BYTE_MAPS[variant]
    assert tuple((plane.name, plane.offset, plane.nbytes) for plane in page.planes) == arrays
    assert sum(plane.nbytes for plane in page.planes) == used
    assert page.run_bytes == run
    assert page.page_bytes == 8 * run
    assert page.pages_shape(3) == (3, 8, 128, run // 128)


@given(page=formats())
def test_arrays_lie_side_by_side_inside_the_run(page: PageFormat) -> None:
    end = 0
    for plane in page.planes:
        assert plane.offset == end, "a gap or an overlap"
        assert plane.nbytes == torch.Size(plane.shape).numel() * plane.dtype.itemsize
        assert plane.offset % plane.dtype.itemsize == 0
        end += plane.nbytes
    assert end <= page.run_bytes
    assert page.run_bytes % 64 == 0, "runs start on cache lines"
    assert page.run_bytes % page.block_size == 0, "vLLM counts whole bytes per token"
    smaller = page.run_bytes - page.block_size
    while smaller >= end:
        assert smaller % 64, "the run could be smaller"
        smaller -= page.block_size


@given(page=formats())
def test_the_layout_names_every_offset(page: PageFormat) -> None:
    layout, at = page.layout(), {plane.name: plane.offset for plane in page.planes}
    assert (layout.k_offset, layout.v_offset) == (at.pop("K"), at.pop("V"))
    assert (layout.k_scales_offset, layout.v_scales_offset) == (
        at.pop("K scales", 0),
        at.pop("V scales", 0),
    )
    for name, offset in (("K", layout.k_patches_offset), ("V", layout.v_patches_offset)):
        assert offset == at.pop(f"{name} patch tags", 0)
        if page.patch_slots:
            assert at.pop(f"{name} patch scales") == offset + 2 * page.patch_slots
            assert at.pop(f"{name} patch codes") == offset + 6 * page.patch_slots
    assert not at
    assert layout.run_bytes * page.num_kv_heads == page.page_bytes
    assert Quantisation(layout.quantisation) is page.quantisation
    assert layout.patch_slots == page.patch_slots
    if page.patch_slots:
        assert page.patch_slots * 8 == page.block_size
        assert PatchCode(layout.patch_code) is page.patch_code
    assert all(isinstance(number, int) for number in layout)


@pytest.mark.parametrize("block_size", range(16, 257, 16))
def test_capacity_against_bfloat16(block_size: int) -> None:
    plain = tokens_per_gib(PageFormat(torch.bfloat16, block_size, 8, 128))
    for variant, ratio in (("c8d", 1.9), ("c8s", 1.99), ("c8p-int4", 1.85), ("c8p-e3m0", 1.85)):
        page = int8_pages.page_format(variant, block_size, 8, 128)
        assert tokens_per_gib(page) >= ratio * plain


#: Head dimension: bytes per token and kv head of c8d, c8s, c8p, and the ratios to bfloat16.
OVERHEAD = {
    64: ((136, 1.882), (128, 2.0), (138, 1.855)),
    80: ((200, 1.6), (192, 1.667), (206, 1.553)),
    96: ((200, 1.92), (192, 2.0), (206, 1.864)),
    128: ((264, 1.939), (256, 2.0), (274, 1.869)),
    256: ((520, 1.969), (512, 2.0), (546, 1.875)),
}


@pytest.mark.parametrize("head_dim", OVERHEAD)
def test_the_overhead_that_the_documentation_states(head_dim: int, repository: Path) -> None:
    text = (repository / "docs" / "pages.md").read_text()
    row = next(line for line in text.splitlines() if line.startswith(f"| {head_dim} "))
    for variant, (nbytes, ratio) in zip(
        ("c8d", "c8s", "c8p-int4"), OVERHEAD[head_dim], strict=True
    ):
        page = int8_pages.page_format(variant, 128, 1, head_dim)
        assert page.token_bytes == nbytes
        assert round(4 * head_dim / nbytes, 3) == ratio
        assert f"{nbytes} ({ratio:.3f})" in row


def test_the_capacity_that_the_documentation_states(repository: Path) -> None:
    text = " ".join((repository / "docs" / "pages.md").read_text().split())
    formats = [PageFormat(torch.bfloat16, 128, 8, 128)]
    formats += [int8_pages.page_format(name, 128, 8, 128) for name in ("c8d", "c8s", "c8p-int4")]
    for page, name in zip(formats, ("bf16", "c8d", "c8s", "c8p"), strict=True):
        tokens = tokens_per_gib(page)
        assert f"{tokens:,} of {name}" in text or f"{tokens:,} tokens of {name}" in text
    assert int8_pages.page_format("c8p-int4", 16, 8, 128).token_bytes == 276


@pytest.mark.parametrize(("head_dim", "columns"), [(16, 32), (48, 64), (80, 96), (112, 128)])
def test_odd_head_dimensions_are_padded(head_dim: int, columns: int) -> None:
    page = int8_pages.page_format("c8p-int4", 16, 2, head_dim)
    assert page.padded_head_dim == columns
    assert page.plane("K").shape == (columns // 32, 16, 32)
    assert page.plane("V").offset == 16 * columns
    assert page.plane("V patch codes").shape == (2, columns // 2)
    assert page.layout().head_dim == head_dim


@pytest.mark.parametrize("variant", VARIANTS)
def test_moving_a_region_moves_the_block(variant: str) -> None:
    int8 = Int8(int8_pages.page_format(variant, 32, 2, 80))
    pages = int8_pages.make_pages(int8.page, 4)
    key, value = int8.rows(32, torch.Generator().manual_seed(0))
    slots = torch.arange(32)
    kv_cache_write(key, value, pages, slots + 32, int8.page.layout(), **int8.write_options())
    want = int8_pages.read(pages, int8, slots + 32)
    (region,) = int8.page.regions(4)
    raw = pages.view(torch.uint8).flatten()
    source, target = (region.offset + block * region.stride for block in (1, 3))
    raw[target : target + region.nbytes] = raw[source : source + region.nbytes].clone()
    raw[source : source + region.nbytes] = 255
    for moved, there in zip(int8_pages.read(pages, int8, slots + 96), want, strict=True):
        assert torch.equal(moved, there)


@pytest.mark.parametrize(
    ("replaced", "message"),
    [
        ({"dtype": torch.bfloat16}, "c8p pages hold int8, got torch.bfloat16. Use --kv-cache-dty"),
        ({"quantisation": Quantisation.NONE}, "a page without quantisation has dtype torch.int8"),
        ({"block_size": 24}, "block size 24 is not supported"),
        ({"head_dim": 8}, "head dimension 8 is not supported"),
        ({"num_kv_heads": 0}, "a page needs at least one kv head, got 0"),
    ],
    ids=str,
)
def test_refusals(replaced: dict, message: str) -> None:
    page = int8_pages.page_format(PATCHED[0], 16, 2, 64)
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(page, **replaced)


def test_an_array_that_a_page_does_not_have() -> None:
    with pytest.raises(KeyError, match="V scales"):
        int8_pages.page_format("c8s", 16, 2, 64).plane("V scales")
