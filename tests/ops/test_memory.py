"""Huge pages: what is in memory stays, and the kernel says that they are there."""

from __future__ import annotations

import mmap
from pathlib import Path

import pytest
import torch

from ascend_plugin.ops.native import memory

MIB = 2**20


def huge_bytes(tensor: torch.Tensor) -> int:
    """Return how much memory on huge pages the mappings have that a tensor lies in."""
    start, found, inside = tensor.data_ptr(), 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        first = line.split()[0]
        if "-" in first and not first.endswith(":"):
            begin, end = (int(part, 16) for part in first.split("-"))
            inside = begin < start + tensor.nbytes and start < end
        elif inside and first == "AnonHugePages:":
            found += int(line.split()[1]) * 1024
    return found


def collapsed(*tensors: torch.Tensor) -> int:
    moved = memory.collapse_into_huge_pages(tensors)
    if moved == 0:
        pytest.skip("this kernel has no huge pages to give")
    return moved


def aligned(mebibytes: int) -> torch.Tensor:
    """Return int32 that count up, on whole huge pages in a mapping of their own.

    What malloc gives may share its last huge page with memory that is freed and returned to the
    system later, which takes that page apart.
    """
    mapping = mmap.mmap(-1, (mebibytes + 2) * MIB, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    first = -torch.frombuffer(mapping, dtype=torch.int8).data_ptr() % (2 * MIB)
    count = mebibytes * MIB // 4
    weights = torch.frombuffer(mapping, dtype=torch.int32, offset=first, count=count)
    return weights.copy_(torch.arange(count))


def test_tensors_stay_what_they_are() -> None:
    weights = aligned(16)
    address = weights.data_ptr()
    moved = collapsed(weights, weights[5:])
    assert weights.data_ptr() == address
    assert torch.equal(weights, torch.arange(4 * MIB, dtype=torch.int32))
    assert moved <= weights.nbytes, "a storage counts once"
    assert huge_bytes(weights) >= moved


def test_what_uses_little_of_a_huge_page_stays() -> None:
    assert memory.collapse_into_huge_pages([torch.ones(1000)]) == 0
    assert memory.collapse_into_huge_pages([torch.empty(0), torch.empty(MIB, device="meta")]) == 0
    assert memory.collapse_into_huge_pages([]) == 0


def test_neighbours_share_a_huge_page() -> None:
    """Parts of one mapping, each smaller than a huge page."""
    whole = torch.ones(16 * MIB, dtype=torch.int8)
    parts = [
        torch.frombuffer(memoryview(whole.numpy())[i * MIB : (i + 1) * MIB], dtype=torch.int8)
        for i in range(16)
    ]
    assert collapsed(*parts) >= 12 * MIB
    assert bool((whole == 1).all())


def test_a_kernel_without_them(monkeypatch, tmp_path) -> None:
    monkeypatch.setattr(memory, "_HUGE_PAGE_SIZE", tmp_path / "nothing")
    assert memory.collapse_into_huge_pages([torch.ones(4 * MIB)]) == 0


def test_an_empty_cache_gets_them() -> None:
    cache = torch.zeros(4 * MIB, dtype=torch.int32)
    if not memory.back_zeroed_with_huge_pages(cache):
        pytest.skip("this kernel has no huge pages to give")
    assert not cache.any()
    cache.fill_(1)
    assert huge_bytes(cache) >= 12 * MIB
