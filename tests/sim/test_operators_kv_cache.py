"""Writes into the paged cache."""

from __future__ import annotations

import pytest
import torch
from sim_parity import launches

from ascend_plugin.ops.nz import from_nz

DTYPES = [torch.bfloat16, torch.float16, torch.int8, torch.float32]
SLOTS = [17, 0, 63, -1, 40]


def _rows(seed: int, dtype: torch.dtype, heads: int = 3, width: int = 64) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-99, 99, (len(SLOTS), heads, width), generator=generator).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("index_dtype", [torch.int32, torch.int64], ids=str)
@pytest.mark.parametrize("cast", [False, True], ids=["nd", "nz format"])
def test_nz_pages(dtype: torch.dtype, index_dtype: torch.dtype, cast: bool) -> None:
    import torch_npu

    key, value = _rows(1, dtype), _rows(2, dtype, width=32)
    column = 32 // dtype.itemsize
    caches = [
        torch.zeros(4, 3 * width // column, 16, column, dtype=dtype, device="npu")
        for width in (64, 32)
    ]
    if cast and dtype in (torch.bfloat16, torch.float16):
        torch.npu.config.allow_internal_format = True
        caches = [torch_npu.npu_format_cast(each, 29) for each in caches]
    slots = torch.tensor(SLOTS, dtype=index_dtype)
    torch_npu.npu_scatter_pa_kv_cache(
        key.npu(), value.npu(), *caches, slots.npu(), cache_mode="PA_NZ"
    )
    for cache, rows in zip(caches, (key, value), strict=True):
        if cast:
            cache = torch_npu.npu_format_cast(cache, 2)
        by_slot = from_nz(cache.cpu()).flatten(0, 1)  # [slots, heads * D]
        expected = torch.zeros_like(by_slot)
        for slot, row in zip(SLOTS, rows.flatten(1), strict=True):
            if slot >= 0:
                expected[slot] = row
        assert torch.equal(by_slot, expected)
    assert launches()["aclnnScatterPaKvCache"]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_plain_pages(dtype: torch.dtype) -> None:
    import torch_npu

    key, value = _rows(1, dtype), _rows(2, dtype)
    caches = [torch.zeros(4, 16, 3, 64, dtype=dtype, device="npu") for _ in range(2)]
    slots = torch.tensor(SLOTS, dtype=torch.int32)
    torch_npu.npu_scatter_pa_kv_cache(
        key.npu(), value.npu(), *caches, slots.npu(), cache_mode="Norm"
    )
    for cache, rows in zip(caches, (key, value), strict=True):
        by_slot = cache.cpu().flatten(0, 1)
        expected = torch.zeros_like(by_slot)
        for slot, row in zip(SLOTS, rows, strict=True):
            if slot >= 0:
                expected[slot] = row
        assert torch.equal(by_slot, expected)


def test_planes_of_a_page() -> None:
    """K and V planes of one buffer: slots move to even planes of K's view and of V's."""
    import torch_npu

    key, value = _rows(1, torch.bfloat16), _rows(2, torch.bfloat16)
    planes = torch.zeros(8, 12, 16, 16, dtype=torch.bfloat16, device="npu")
    slots = torch.tensor(SLOTS, dtype=torch.int64)
    doubled = torch.where(slots >= 0, slots + slots // 16 * 16, slots)
    torch_npu.npu_scatter_pa_kv_cache(
        *(key.npu(), value.npu(), planes[:-1], planes[1:], doubled.npu()), cache_mode="PA_NZ"
    )
    pages = from_nz(planes.cpu().view(4, 2, 12, 16, 16))  # [blocks, K|V, block, heads * D]
    for slot, k, v in zip(SLOTS, key.flatten(1), value.flatten(1), strict=True):
        if slot >= 0:
            assert torch.equal(pages[slot // 16, 0, slot % 16], k)
            assert torch.equal(pages[slot // 16, 1, slot % 16], v)
    assert int(pages.count_nonzero()) == int(key[torch.tensor(SLOTS) >= 0].count_nonzero()) + int(
        value[torch.tensor(SLOTS) >= 0].count_nonzero()
    )
