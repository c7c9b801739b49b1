"""``mla_cache_write``: every implementation against the formulas of the documentation."""

from __future__ import annotations

from typing import Any

import paging
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from implementations import threads
from latent_cases import VARIANTS, make_pages, positions
from strategies import BLOCK_SIZES, DTYPES

from ascend_plugin.kv_cache import LatentPageFormat
from ascend_plugin.ops.mla_cache_write import mla_cache_write
from ascend_plugin.ops.page_layout import Quantisation
from ascend_plugin.ops.quantise import quantise_dynamic, quantise_static

DEEPSEEK = {"latent_dim": 512, "rotary_dim": 64}


def _page(variant: str, dtype: torch.dtype, block_size: int = 16, **dims: int) -> LatentPageFormat:
    shape = {"latent_dim": 48, "rotary_dim": 32, **dims}
    kind = VARIANTS[variant]
    return LatentPageFormat(
        torch.int8 if variant else dtype, block_size, quantisation=kind, **shape
    )


def _rows(page: LatentPageFormat, tokens: int, dtype: torch.dtype, strided: bool, seed: int) -> Any:
    rng = torch.Generator().manual_seed(seed)
    extra = 7 if strided else 0
    both = torch.randn(tokens, page.latent_dim + page.rotary_dim + extra, generator=rng).to(dtype)
    end = page.latent_dim + page.rotary_dim
    parts = both[:, : page.latent_dim], both[:, page.latent_dim : end]
    return parts if strided else tuple(part.contiguous() for part in parts)


def _expected(
    page: LatentPageFormat, latents: torch.Tensor, rotary: torch.Tensor, scales: torch.Tensor | None
) -> dict[str, torch.Tensor]:
    """Return what the arrays of a page hold for rows."""
    held = {"rotary parts": rotary.to(page.rotary_dtype)}
    if page.quantisation is Quantisation.C8D:
        rows = quantise_dynamic(latents)
        return {**held, "latents": rows.codes, "scales": rows.scales}
    if scales is not None:
        return {**held, "latents": quantise_static(latents, scales).codes}
    return {**held, "latents": latents.to(page.dtype)}


def _check_written(
    pages: torch.Tensor,
    page: LatentPageFormat,
    slots: torch.Tensor,
    held: dict[str, torch.Tensor],
    before: torch.Tensor,
) -> None:
    """The arrays hold what they must at the slots, and no other byte has changed."""
    want = before.clone()
    for name, rows in held.items():
        raw = rows.contiguous().view(torch.uint8)
        itemsize = rows.dtype.itemsize
        at = positions(pages, page, name, slots)
        if rows.dim() == 2:
            padding = at[:, rows.shape[1] :]  # of latents; what it holds is nobody's business
            want[padding] = paging.storage(pages).view(torch.uint8)[padding]
            at = at[:, : rows.shape[1]]
        want[at[..., None] + torch.arange(itemsize)] = raw.view(*rows.shape, itemsize)
    assert torch.equal(paging.storage(pages).view(torch.uint8), want)


@given(
    variant=st.sampled_from(tuple(VARIANTS)),
    dtype=st.sampled_from(DTYPES),
    page_dtype=st.sampled_from(DTYPES),
    block_size=st.sampled_from(BLOCK_SIZES),
    latent_dim=st.sampled_from((16, 48, 64, 80, 512)),
    rotary_dim=st.sampled_from((16, 48, 64, 128)),
    tokens=st.integers(0, 90),
    strided=st.booleans(),
    interleaved=st.booleans(),
    count=st.sampled_from((1, 2)),
    seed=st.integers(0, 999),
)
@settings(max_examples=80)
def test_any_call_writes_what_it_must(
    implementation: str,
    variant: str,
    dtype: torch.dtype,
    page_dtype: torch.dtype,
    block_size: int,
    latent_dim: int,
    rotary_dim: int,
    tokens: int,
    strided: bool,
    interleaved: bool,
    count: int,
    seed: int,
) -> None:
    page = _page(variant, page_dtype, block_size, latent_dim=latent_dim, rotary_dim=rotary_dim)
    latents, rotary = _rows(page, tokens + 2, dtype, strided, seed)
    pages = make_pages(page, tokens // block_size + 3, interleaved)
    rng = torch.Generator().manual_seed(seed)
    slots = torch.randperm(pages.shape[0] * block_size, generator=rng)[:tokens]
    slots[torch.rand(tokens, generator=rng) < 0.2] = -1
    scales = torch.rand(latent_dim, generator=rng) * 0.02 + 0.01 if variant == "c8s" else None
    before = paging.storage(pages).view(torch.uint8).clone()
    with threads(count):
        mla_cache_write(latents, rotary, pages, slots, page.layout(), channel_scales=scales)
    kept = slots >= 0
    rows = (latents[:tokens][kept], rotary[:tokens][kept])
    _check_written(pages, page, slots[kept], _expected(page, *rows, scales), before)


def test_rows_that_are_not_finite(implementation: str) -> None:
    for variant in ("c8d", "c8s"):
        page = _page(variant, torch.int8, **DEEPSEEK)
        latents, rotary = _rows(page, 6, torch.float32, False, 1)
        latents[1, 3], latents[2, 500], latents[3] = float("nan"), float("inf"), 0.0
        latents[4] = 1e-40
        rotary[5, 2] = float("nan")
        scales = torch.full((512,), 0.02) if variant == "c8s" else None
        pages = make_pages(page, 2)
        before = paging.storage(pages).view(torch.uint8).clone()
        slots = torch.arange(3, 9)
        counters = torch.zeros(4, dtype=torch.int64)
        options = {"channel_scales": scales, "counters": counters}
        mla_cache_write(latents, rotary, pages, slots, page.layout(), **options)
        held = _expected(page, latents, rotary, scales)
        held["rotary parts"][5, 2] = float("nan")
        _check_written(pages, page, slots, _nan_bits(pages, page, slots, held), before)
        saturated = 0 if scales is None else int(quantise_static(latents, scales).saturated.sum())
        assert counters.tolist() == [6, saturated, 0, 0]


def _nan_bits(
    pages: torch.Tensor,
    page: LatentPageFormat,
    slots: torch.Tensor,
    held: dict[str, torch.Tensor],
) -> dict[str, torch.Tensor]:
    """Take the bits of a NaN from the pages, if there is one: any NaN will do."""
    flat = paging.storage(pages).view(torch.uint8)
    for name, rows in held.items():
        if not rows.is_floating_point():
            continue
        at = positions(pages, page, name, slots)[..., None] + torch.arange(rows.dtype.itemsize)
        written = flat[at].view(rows.dtype).squeeze(-1)
        assert torch.equal(written.isnan(), rows.isnan())
        held[name] = torch.where(rows.isnan(), written, rows)
    return held


@pytest.mark.parametrize("variant", VARIANTS)
def test_slots_outside_the_pages_are_refused(implementation: str, variant: str) -> None:
    page = _page(variant, torch.float32)
    latents, rotary = _rows(page, 3, torch.float32, False, 0)
    pages = make_pages(page, 2)
    before = paging.storage(pages).view(torch.uint8).clone()
    scales = torch.ones(48) if variant == "c8s" else None
    with pytest.raises(ValueError, match=r"slot 32 lies outside the pages, which hold 32"):
        mla_cache_write(
            latents,
            rotary,
            pages,
            torch.tensor([0, 32, 1]),
            page.layout(),
            channel_scales=scales,
        )
    assert torch.equal(paging.storage(pages).view(torch.uint8), before)


@pytest.mark.parametrize("variant", VARIANTS)
def test_opcheck_and_compiled(implementation: str, variant: str) -> None:
    page = _page(variant, torch.float32)
    latents, rotary = _rows(page, 5, torch.float32, True, 3)
    slots = torch.tensor([4, -1, 17, 5])
    scales = torch.rand(48) * 0.02 + 0.01 if variant == "c8s" else None
    pages = torch.zeros_like(make_pages(page, 2).contiguous())
    arguments = (latents, rotary, pages, slots, list(page.layout()), scales)
    torch.library.opcheck(torch.ops.ascend_plugin.mla_cache_write.default, arguments)
    want = pages.clone()
    call = (page.layout(),)
    mla_cache_write(latents, rotary, want, slots, *call, channel_scales=scales)
    compiled = torch.compile(mla_cache_write)
    got = torch.zeros_like(want)
    compiled(latents, rotary, got, slots, *call, channel_scales=scales)
    assert torch.equal(paging.bits(got), paging.bits(want))
    assert int(paging.bits(want).count_nonzero()) > 0
