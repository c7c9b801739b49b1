"""The arithmetic of int8 pages: what codes, scales and patches stand for."""

from __future__ import annotations

import int8_pages
import numpy as np
import paging
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from int8_pages import PATCHED, STATIC, VARIANTS, Int8
from strategies import BLOCK_SIZES, HEAD_DIMS

from ascend_plugin.ops import quantise
from ascend_plugin.ops.page_layout import PatchCode


def _rows(*shape: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator) * 10 ** torch.randn(
        (*shape[:-1], 1), generator=generator
    )


@pytest.mark.parametrize("head_dim, mixed", [(16, 16), (48, 16), (80, 16), (96, 32), (128, 128)])
def test_rotation_keeps_products_and_undoes_itself(head_dim: int, mixed: int) -> None:
    assert quantise.rotated_channels(head_dim) == mixed
    keys, queries = _rows(50, head_dim).double(), _rows(7, head_dim, seed=1).double()
    rotated = quantise.rotate(keys)
    torch.testing.assert_close(quantise.rotate(rotated), keys * mixed)
    torch.testing.assert_close(
        quantise.rotate(queries) @ rotated.T / mixed, queries @ keys.T, rtol=1e-9, atol=1e-9
    )


def test_rotation_spreads_a_large_channel() -> None:
    keys = torch.randn(200, 128, generator=torch.Generator().manual_seed(0))
    keys[:, 5] *= 50
    plain, turned = (
        quantise.quantise_dynamic(keys),
        quantise.quantise_dynamic(quantise.rotate(keys)),
    )
    back = quantise.rotate(turned.codes * turned.scales[:, None]) / 128
    off = (back - keys).norm() / keys.norm()
    assert off * 2 < (plain.codes * plain.scales[:, None] - keys).norm() / keys.norm()


def test_dynamic_codes_are_off_by_half_a_scale_at_most() -> None:
    rows = _rows(500, 3, 64)
    codes, scales = quantise.quantise_dynamic(rows)
    assert int(codes.abs().max()) == 127
    assert bool((codes.abs().amax(-1) == 127).all()), "the largest element takes the largest code"
    off = (codes.double() * scales[..., None].double() - rows.double()).abs()
    assert bool((off <= scales[..., None].double() * 0.5001).all())


def test_dynamic_rows_without_a_scale() -> None:
    rows = torch.zeros(4, 32)
    rows[1, 3], rows[2, 4], rows[3, 5] = 1e-40, torch.nan, -torch.inf
    codes, scales = quantise.quantise_dynamic(rows)
    assert not codes.any()
    assert scales[:2].tolist() == [0.0, 0.0]
    assert bool(scales[2:].isnan().all())


def test_static_codes_saturate_and_leave_a_residual() -> None:
    scales = torch.tensor([0.5, 1.0, 2.0, 4.0])
    rows = torch.tensor([[10.0, 10.4, -3.0, 508.0], [64.0, -900.0, 0.0, 0.0]])
    codes, residual, saturated = quantise.quantise_static(rows, scales)
    assert codes.tolist() == [[20, 10, -2, 127], [127, -127, 0, 0]]
    torch.testing.assert_close(residual, torch.tensor([[0, 0.4, 0.5, 0], [1, -773, 0, 0]]))
    assert saturated.tolist() == [False, True]


@pytest.mark.parametrize("threshold", [0.0, 0.01, 0.5, float("inf")])
def test_outliers_are_rows_with_a_larger_relative_error(threshold: float) -> None:
    scales = torch.full((64,), 0.03)
    rows = _rows(2000, 64)
    rows[:3] = torch.tensor([0.0, torch.nan, torch.inf])[:, None]
    static = quantise.quantise_static(rows, scales)
    found = quantise.outliers(rows, static.residual, scales, threshold)
    off = (static.codes.double() * scales - rows).norm(dim=-1) / rows.double().norm(dim=-1)
    clear = ((off - threshold).abs() > 1e-5 * threshold + 1e-12) & off.isfinite()
    assert torch.equal(found[clear], (off > threshold)[clear])
    assert not found[:3].any(), "no patch mends zero, NaN or infinity"


@pytest.mark.parametrize("code", PatchCode)
def test_patches_round_to_the_nearest_value(code: PatchCode) -> None:
    residual = _rows(300, 80, seed=4)
    patches = quantise.encode_patches(residual, code)
    assert patches.codes.shape == (300, 48)  # 80 columns in whole groups of 32
    assert not patches.codes[:, 40:].any()
    values = {
        PatchCode.INT4: torch.arange(-7, 8),
        PatchCode.E3M0: torch.tensor([s * v for v in int8_pages.E3M0_VALUES for s in (-1, 1)]),
    }[code].double()
    got = quantise.decode_patches(patches, code, 80, torch.float64)
    scales = patches.scales.double()[:, None]
    best = (values * scales[..., None] - residual.double()[..., None]).abs().amin(-1)
    off = (got - residual.double()).abs()
    torch.testing.assert_close(off, best, atol=0.0, rtol=1e-4)
    assert bool((off.amax(-1) < residual.abs().amax(-1).double()).all())


def test_e3m0_keeps_its_midpoints_low_and_zero_unsigned() -> None:
    units = torch.tensor([0.0, 0.5, 0.51, 1.5, 1.51, 3.0, 6.0, 12.0, 24.0, 48.0, 48.1, 64.0])
    residual = torch.cat([units, -units, torch.zeros(8)])
    patches = quantise.encode_patches(residual[None], PatchCode.E3M0)
    assert patches.scales.tolist() == [1.0]
    low = torch.tensor([0.0, 0, 1, 1, 2, 2, 4, 8, 16, 32, 64, 64])
    values = quantise.decode_patches(patches, PatchCode.E3M0, 32)[0]
    assert torch.equal(values, torch.cat([low, -low, torch.zeros(8)]))
    nibbles = torch.stack([patches.codes[0] & 15, patches.codes[0] >> 4], -1).flatten()
    assert not (nibbles == 8).any(), "-0 is never written"


def test_the_even_column_is_in_the_low_half() -> None:
    residual = torch.zeros(1, 32)
    residual[0, :4] = torch.tensor([7.0, -7.0, 1.0, -1.0])
    patches = quantise.encode_patches(residual, PatchCode.INT4)
    assert patches.codes[0, :3].tolist() == [0x97, 0xF1, 0]


@given(
    variant=st.sampled_from(tuple(VARIANTS)),
    block_size=st.sampled_from(BLOCK_SIZES),
    head_dim=st.sampled_from((*HEAD_DIMS, 48)),
    order=st.sampled_from(paging.ORDERS),
    seed=st.integers(0, 2**16),
)
@settings(max_examples=60)
def test_pages_mean_what_their_bytes_say(
    variant: str, block_size: int, head_dim: int, order: str, seed: int
) -> None:
    int8 = Int8(int8_pages.page_format(variant, block_size, 2, head_dim))
    pages = int8_pages.make_pages(int8.page, 3, order, seed)  # arbitrary codes, tags and patches
    for name in ("scales", "patch scales"):  # NaN would say too little
        for block, head, plane in np.ndindex(3, 2, 2):
            if f"{'KV'[plane]} {name}" in {each.name for each in int8.page.planes}:
                there = int8_pages.array(pages, int8.page, block, head, f"{'KV'[plane]} {name}")
                there[:] = np.random.default_rng(seed + block).normal(size=there.shape)
    slots = torch.arange(3 * block_size)
    want = int8_pages.read(pages, int8, slots)
    for dtype, tolerance in ((torch.float64, 1e-12), (torch.float32, 1e-5)):
        got = quantise.dequantise_pages(pages, int8.page.layout(), int8.channel_scales(), dtype)
        for plane, expected in zip(got, want, strict=True):
            assert plane.dtype == dtype
            tokens = plane.transpose(1, 2).flatten(0, 1).double()
            torch.testing.assert_close(tokens, expected, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("variant", STATIC)
def test_static_pages_without_scales_are_refused(variant: str) -> None:
    page = int8_pages.page_format(variant, 16, 1, 32)
    pages = int8_pages.make_pages(page, 1)
    with pytest.raises(ValueError, match="pages with static scales need channel_scales"):
        quantise.dequantise_pages(pages, page.layout())


@pytest.mark.parametrize("variant", PATCHED)
def test_a_patch_makes_its_row_better(variant: str) -> None:
    int8 = Int8(int8_pages.page_format(variant, 16, 2, 64))
    scales = int8.channel_scales()
    assert scales is not None
    generator = torch.Generator().manual_seed(5)
    key, _ = int8.rows(400, generator)
    static = quantise.quantise_static(key, scales[0])
    bad = quantise.outliers(key, static.residual, scales[0], 0.1)
    patches = quantise.encode_patches(static.residual[bad], int8.page.patch_code)
    mended = quantise.decode_patches(patches, int8.page.patch_code, 64)
    before = static.residual[bad].norm(dim=-1)
    after = (static.residual[bad] - mended).norm(dim=-1)
    assert int(bad.sum()) > 50
    assert bool((after < 0.3 * before).all())
