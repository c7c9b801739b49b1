"""Huge pages under the memory that a decode step streams: the KV cache and weights."""

from __future__ import annotations

import ctypes
import mmap
import sys
from collections.abc import Iterable, Iterator
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

import torch

# Linux, <asm-generic/mman-common.h>
_MADV_DONTNEED = 4
_MADV_HUGEPAGE = 14
_MADV_COLLAPSE = 25

_HUGE_PAGE_SIZE = Path("/sys/kernel/mm/transparent_hugepage/hpage_pmd_size")

#: What a huge page must hold of the tensors at least: the rest of it may have had no memory yet.
_USED_SHARE = 0.75


def back_zeroed_with_huge_pages(tensor: torch.Tensor) -> bool:
    """Put the storage of an all-zero tensor on transparent huge pages, best effort.

    Attention over a long context streams the whole cache; with 4 KiB pages of memory, address
    translation costs 10 to 30 %. Memory that was touched already keeps its small pages, so the
    storage is given back to the system first: it reads as zeros again and is faulted in as huge
    pages.

    Args:
        tensor: CPU tensor whose whole storage holds zeros; it still does afterwards.

    Returns:
        Whether the system accepted.
    """
    if tensor.device.type != "cpu" or not sys.platform.startswith("linux"):
        return False
    storage = tensor.untyped_storage()
    start = -(-storage.data_ptr() // mmap.PAGESIZE) * mmap.PAGESIZE
    end = (storage.data_ptr() + storage.nbytes()) // mmap.PAGESIZE * mmap.PAGESIZE
    if end <= start:
        return False
    # Asked first: where huge pages are not to be had, the memory stays as it is.
    return _advise(start, end, _MADV_HUGEPAGE) and _advise(start, end, _MADV_DONTNEED)


def tensors_in(value: Any) -> list[torch.Tensor]:
    """Return a tensor, or those of a weight in a kernel's order (a dataclass); else nothing."""
    if is_dataclass(value) and not isinstance(value, type):
        parts = [getattr(value, field.name) for field in fields(value)]
    else:
        parts = [value]
    return [part for part in parts if isinstance(part, torch.Tensor)]


def collapse_into_huge_pages(tensors: Iterable[torch.Tensor]) -> int:
    """Move tensors to transparent huge pages as they are, best effort; addresses stay.

    Weights are allocated one by one and filled at once, so they have small pages. The kernel (Linux
    6.1 and later) copies them together. A huge page of which the tensors use less than three
    quarters stays small.

    Args:
        tensors: on the CPU; others are passed over.

    Returns:
        Bytes that are on huge pages now.
    """
    if not sys.platform.startswith("linux") or not _HUGE_PAGE_SIZE.exists():
        return 0
    size = int(_HUGE_PAGE_SIZE.read_text())
    used: dict[int, int] = {}  # bytes by number of huge page
    for start, end in _spans(tensors):
        for page in range(start // size, -(-end // size)):
            part = min(end, (page + 1) * size) - max(start, page * size)
            used[page] = used.get(page, 0) + part
    chosen = [page for page, part in used.items() if part >= _USED_SHARE * size]
    return sum(size for page in chosen if _advise(page * size, (page + 1) * size, _MADV_COLLAPSE))


def _spans(tensors: Iterable[torch.Tensor]) -> Iterator[tuple[int, int]]:
    """Yield first and last address of each storage, once."""
    seen = set()
    for tensor in tensors:
        if tensor.device.type != "cpu":
            continue
        storage = tensor.untyped_storage()
        start = storage.data_ptr()
        if start and start not in seen:
            seen.add(start)
            yield start, start + storage.nbytes()


def _advise(start: int, end: int, advice: int) -> bool:
    """Call ``madvise`` on whole pages; False where it does not exist or refuses."""
    try:
        madvise = ctypes.CDLL(None, use_errno=True).madvise
    except (OSError, AttributeError):
        return False
    length = ctypes.c_size_t(end - start)
    return int(madvise(ctypes.c_void_p(start), length, ctypes.c_int(advice))) == 0
