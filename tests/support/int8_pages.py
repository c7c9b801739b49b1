"""Int8 pages for tests: written and read byte by byte, as the documentation says.

Nothing here uses the operators, ``ops.nz`` or ``ops.quantise``: it is what they are compared with.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import paging
import torch
from numpy.typing import NDArray

from ascend_plugin.kv_cache import PageFormat, Plane
from ascend_plugin.ops.page_layout import PatchCode, Quantisation

#: Every kind of int8 page.
VARIANTS = {
    "c8d": (Quantisation.C8D, PatchCode.INT4),
    "c8s": (Quantisation.C8S, PatchCode.INT4),
    "c8p-int4": (Quantisation.C8P, PatchCode.INT4),
    "c8p-e3m0": (Quantisation.C8P, PatchCode.E3M0),
}
STATIC = tuple(name for name in VARIANTS if name != "c8d")
PATCHED = ("c8p-int4", "c8p-e3m0")

#: Outliers of :meth:`Int8.rows` lie far above, all other rows far below.
THRESHOLD = 0.1

E3M0_VALUES = (0, 1, 2, 4, 8, 16, 32, 64)
E3M0_MIDPOINTS = (0.5, 1.5, 3.0, 6.0, 12.0, 24.0, 48.0)

_SMALLEST_NORMAL = np.float32(2.0**-126)


def page_format(variant: str, block_size: int, kv_heads: int, head_dim: int) -> PageFormat:
    """Return the format of a kind of int8 page."""
    return PageFormat(torch.int8, block_size, kv_heads, head_dim, *VARIANTS[variant])


@dataclass(frozen=True, slots=True)
class Int8:
    """A format and what its operators need besides pages.

    Attributes:
        page: the format.
        thresholds: C8P's, of K and of V.
    """

    page: PageFormat
    thresholds: tuple[float, float] = (THRESHOLD, THRESHOLD)

    @property
    def static(self) -> bool:
        return self.page.quantisation.static

    @property
    def patched(self) -> bool:
        return self.page.quantisation is Quantisation.C8P

    def magnitudes(self) -> torch.Tensor:
        """Spread of each channel, ``[2, kv_heads, head_dim]``."""
        generator = torch.Generator().manual_seed(1)
        shape = (2, self.page.num_kv_heads, self.page.head_dim)
        return 0.25 + 0.5 * torch.rand(shape, generator=generator)

    def channel_scales(self) -> torch.Tensor | None:
        """Scales that hold three times the spread of each channel."""
        return self.magnitudes() * 3 / 127 if self.static else None

    def rows(self, tokens: int, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
        """Draw K and V, ``[tokens, kv_heads, head_dim]``; every fifth row is far too large."""
        shape = (tokens, self.page.num_kv_heads, self.page.head_dim)
        key, value = (torch.randn(shape, generator=generator) * each for each in self.magnitudes())
        for plane in (key, value):
            plane[torch.rand(shape[:2], generator=generator) < 0.2] *= 4
        return key, value

    def write_options(self) -> dict[str, Any]:
        """Keyword arguments of ``kv_cache_write``."""
        thresholds = list(self.thresholds) if self.patched else []
        return {"channel_scales": self.channel_scales(), "patch_thresholds": thresholds}


@cache
def _planes(page: PageFormat) -> dict[str, Plane]:
    return {plane.name: plane for plane in page.planes}


def array(pages: torch.Tensor, page: PageFormat, block: int, head: int, name: str) -> NDArray[Any]:
    """Return a view of an array of one run, by the name of its plane."""
    plane = _planes(page)[name]
    start = pages.storage_offset() + block * pages.stride(0) + head * pages.stride(1) + plane.offset
    raw = paging.storage(pages).numpy()[start : start + plane.nbytes]
    kind = str(plane.dtype).removeprefix("torch.")
    return raw.view(np.dtype(kind)).reshape(plane.shape)


def make_pages(
    page: PageFormat, num_blocks: int, order: str = "LBHNC", seed: int = 0
) -> torch.Tensor:
    """Return pages full of what must never be read: NaN scales, tags that look valid."""
    pages = paging.make_pages(page, num_blocks, order, fill=0)
    generator = torch.Generator().manual_seed(seed)
    flat = paging.storage(pages)
    flat.copy_(torch.randint(-128, 128, flat.shape, generator=generator, dtype=torch.int8))
    numbers = np.random.default_rng(seed)
    for block in range(num_blocks):
        for head in range(page.num_kv_heads):
            for plane in page.planes:
                if plane.name.endswith("scales"):
                    array(pages, page, block, head, plane.name)[:] = np.nan
                if plane.name.endswith("tags"):
                    tags = numbers.integers(0, page.block_size + 3, plane.shape)
                    array(pages, page, block, head, plane.name)[:] = tags
    return pages


def comparable(pages: torch.Tensor, page: PageFormat) -> torch.Tensor:
    """Return a copy of all bytes of pages' memory, without those that may hold anything."""
    whole = paging.storage(pages).clone()
    copy = whole.as_strided(pages.shape, pages.stride(), pages.storage_offset())
    for block in range(pages.shape[0]):
        for head in range(page.num_kv_heads):
            for name in "KV":
                if page.head_dim % 32:  # padding columns of the last group
                    array(copy, page, block, head, name)[-1, :, page.head_dim % 32 :] = 0
                if page.patch_slots:
                    tags = array(copy, page, block, head, f"{name} patch tags")
                    invalid = [owner(page, slot, tag) is None for slot, tag in enumerate(tags)]
                    array(copy, page, block, head, f"{name} patch codes")[invalid] = 0
    return whole


def owner(page: PageFormat, slot: int, tag: int) -> int | None:
    """Return the token that a tag names, if it can lie in this slot."""
    token = int(tag) - 1
    return token if 0 <= token < page.block_size and token % page.patch_slots == slot else None


def write(
    pages: torch.Tensor, int8: Int8, slots: torch.Tensor, key: torch.Tensor, value: torch.Tensor
) -> list[int]:
    """Write tokens one after the other; the four counters."""
    scales = int8.channel_scales()
    counts = [0, 0, 0, 0]
    for i, slot in enumerate(slots.tolist()):
        if slot < 0:
            continue
        block, token = divmod(slot, int8.page.block_size)
        for head in range(int8.page.num_kv_heads):
            for j, (name, rows) in enumerate((("K", key), ("V", value))):
                arrays = _Row(pages, int8.page, block, head, name, token)
                x = rows[i, head].float().numpy()
                counts[0] += 1
                with np.errstate(all="ignore"):
                    if scales is None:
                        _write_dynamic(arrays, x)
                    else:
                        channel = scales[j, head].numpy()
                        _write_static(arrays, x, channel, int8.thresholds[j], counts)
    return counts


@dataclass(frozen=True, slots=True)
class _Row:
    """One token of K or V of a run."""

    pages: torch.Tensor
    page: PageFormat
    block: int
    head: int
    name: str
    token: int

    def array(self, name: str) -> NDArray[Any]:
        return array(self.pages, self.page, self.block, self.head, f"{self.name}{name}")

    def put(self, codes: NDArray[Any]) -> None:
        d = np.arange(codes.size)
        self.array("")[d // 32, self.token, d % 32] = codes.astype(np.int8)


def _scale(largest: np.float32, steps: int) -> tuple[np.float32, np.float32]:
    scale = largest / np.float32(steps)
    if scale < _SMALLEST_NORMAL:
        return np.float32(0), np.float32(0)
    return scale, np.float32(1) / scale


def rotated(x: NDArray[Any]) -> NDArray[Any]:
    """Return the Walsh-Hadamard transform of each power-of-two block of the last dimension."""
    x = x.copy()
    size, stride = x.shape[-1] & -x.shape[-1], 1
    while stride < size:
        for start in range(0, x.shape[-1], 2 * stride):
            a = x[..., start : start + stride].copy()
            b = x[..., start + stride : start + 2 * stride].copy()
            x[..., start : start + stride] = a + b
            x[..., start + stride : start + 2 * stride] = a - b
        stride *= 2
    return x


def _write_dynamic(row: _Row, x: NDArray[np.float32]) -> None:
    x = rotated(x) if row.name == "K" else x
    scale, inverse = _scale(np.abs(x).max(), 127)
    if np.isfinite(x).all():
        row.put(np.clip(np.rint(x * inverse), -127, 127))
        row.array(" scales")[row.token] = scale
    else:
        row.put(np.zeros_like(x))
        row.array(" scales")[row.token] = np.nan


def _write_static(
    row: _Row, x: NDArray[np.float32], channel: NDArray[np.float32], tau: float, counts: list[int]
) -> None:
    scaled = x * (np.float32(1) / channel)
    wanted = np.rint(scaled)
    codes = np.clip(np.where(np.isnan(wanted), 0, wanted), -127, 127).astype(np.float32)
    row.put(codes)
    counts[1] += not bool((np.abs(wanted) <= 127).all())
    if not row.page.patch_slots:
        return
    residual = scaled - codes
    slot = row.token % row.page.patch_slots
    tags = row.array(" patch tags")
    held = owner(row.page, slot, tags[slot])
    taken = held is not None and held < row.token
    off, size = (np.sum(each * each, dtype=np.float32) for each in (residual * channel, x))
    if not off > np.float32(tau * tau) * size:  # false for a row that is not finite
        tags[slot] = tags[slot] if taken else 0
    elif taken:
        counts[3] += 1
    else:
        counts[2] += 1
        tags[slot] = row.token + 1
        _write_patch(row, slot, residual)


def error(x: NDArray[np.float32], difference: NDArray[np.float32]) -> float:
    """Return the relative error of a row, 0 if the row is."""
    size, off = (float(np.sum(each.astype(np.float64) ** 2)) for each in (x, difference))
    return (off / size) ** 0.5 if size else 0.0


def _write_patch(row: _Row, slot: int, residual: NDArray[np.float32]) -> None:
    e3m0 = row.page.patch_code is PatchCode.E3M0
    scale, inverse = _scale(np.abs(residual).max(), 64 if e3m0 else 7)
    codes = row.array(" patch codes")[slot]
    codes[:] = 0
    for d, units in enumerate(residual * inverse):
        if e3m0:
            magnitude = sum(middle < abs(units) for middle in E3M0_MIDPOINTS)
            nibble = magnitude | (8 if units < 0 and magnitude else 0)
        else:
            nibble = int(np.clip(np.rint(units), -7, 7)) & 15
        codes[d // 2] |= nibble << 4 * (d % 2)
    row.array(" patch scales")[slot] = scale


def read(pages: torch.Tensor, int8: Int8, slots: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return what tokens mean: K and V, float64 ``[tokens, kv_heads, head_dim]``."""
    page = int8.page
    blocks = (slots // page.block_size).unique().tolist()
    shape = (2, len(blocks), page.block_size, page.num_kv_heads, page.head_dim)
    found = torch.empty(shape, dtype=torch.float64)
    scales = int8.channel_scales()
    for i, block in enumerate(blocks):
        for head in range(page.num_kv_heads):
            for j, name in enumerate("KV"):
                channel = None if scales is None else scales[j, head].double().numpy()
                run = _read_run(pages, page, block, head, name, channel)
                found[j, i, :, head] = torch.from_numpy(run)
    place = {block: i for i, block in enumerate(blocks)}
    rows = torch.tensor([place[int(block)] for block in slots // page.block_size]).long()
    key, value = found[:, rows, slots % page.block_size]
    return key, value


def _read_run(
    pages: torch.Tensor,
    page: PageFormat,
    block: int,
    head: int,
    name: str,
    channel: NDArray[np.float64] | None,
) -> NDArray[np.float64]:
    """Return K or V of one run, ``[block_size, head_dim]``."""
    nz = array(pages, page, block, head, name)  # [groups, block_size, 32]
    codes = nz.transpose(1, 0, 2).reshape(page.block_size, -1)[:, : page.head_dim].astype(float)
    if channel is None:
        values = codes * array(pages, page, block, head, f"{name} scales")[:, None].astype(float)
        return rotated(values) / (page.head_dim & -page.head_dim) if name == "K" else values
    if page.patch_slots:
        tags, scales, packed = (
            array(pages, page, block, head, f"{name} patch {part}")
            for part in ("tags", "scales", "codes")
        )
        for slot, tag in enumerate(tags):
            token = owner(page, slot, tag)
            if token is not None:
                codes[token] += nibble_values(page, packed[slot]) * float(scales[slot])
    return codes * channel


def nibble_values(page: PageFormat, packed: NDArray[np.uint8]) -> NDArray[np.float64]:
    """Return the values of a patch, ``[head_dim]``, in units of the patch's scale."""
    d = np.arange(page.head_dim)
    nibbles = packed[d // 2].astype(int) >> 4 * (d % 2) & 15
    if page.patch_code is PatchCode.E3M0:
        values = np.array(E3M0_VALUES)[nibbles & 7] * np.where(nibbles & 8, -1, 1)
    else:
        values = np.where(nibbles & 8, nibbles - 16, nibbles)
    return values.astype(float)
