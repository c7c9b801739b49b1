"""The plugin's operators on the NPU, against plain torch on the CPU."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import pytest
import torch

from ascend_plugin.kv_cache import PageFormat
from ascend_plugin.ops import quantise
from ascend_plugin.ops.ascendc import library
from ascend_plugin.ops.dispatch import UnsupportedRequestError
from ascend_plugin.ops.kv_cache_write import kv_cache_write
from ascend_plugin.ops.npu import attention, write
from ascend_plugin.ops.page_layout import Arrangement, PlaneLayout, Quantisation
from ascend_plugin.ops.paged_attention import paged_attention

NONE, C8D, C8S, C8P = Quantisation

#: Relative error of attention: one rounding to bfloat16, or the quantisation's own.
TOLERANCE = {NONE: 4e-3, C8D: 2e-2, C8S: 2e-2}

BLOCKS = 14


@dataclass(frozen=True)
class Case:
    """A batch: (query rows, context tokens) of each sequence, and the heads."""

    sequences: tuple[tuple[int, int], ...]
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 128
    block_size: int = 128
    kind: Quantisation = NONE
    dtype: torch.dtype = torch.bfloat16
    window: int = 0
    causal: bool = True

    @property
    def page(self) -> PageFormat:
        dtype = self.dtype if self.kind is NONE else torch.int8
        shape = (self.block_size, self.kv_heads, self.head_dim)
        return PageFormat(dtype, *shape, self.kind, arrangement=Arrangement.PLANE_MAJOR)

    @property
    def layout(self) -> PlaneLayout:
        return self.page.plane_layout()


class Cache:
    """Pages on the device, and what was written to them."""

    def __init__(self, case: Case, device: torch.device) -> None:
        torch.manual_seed(0)
        self.case, self.device = case, device
        fill = float("nan") if case.kind is NONE else 77
        shape = case.page.pages_shape(BLOCKS)
        self.pages = torch.full(shape, fill, dtype=case.page.dtype).to(device)
        self.table = torch.zeros((len(case.sequences), 4), dtype=torch.int32)
        self.keys: list[torch.Tensor] = []
        self.values: list[torch.Tensor] = []
        self.scales = None
        if case.kind is C8S:
            self.scales = torch.rand(2, case.kv_heads, case.head_dim) * 0.01 + 0.03
        free = list(range(1, BLOCKS))
        for i, (_, length) in enumerate(case.sequences):
            for column in range(-(-length // case.block_size)):
                self.table[i, column] = free.pop()
            self._write(i, length)

    def _write(self, i: int, length: int) -> None:
        case = self.case
        # As after a fused projection: K and V are slices of wider rows.
        wide = torch.randn(length + 1, 2 * case.kv_heads + 1, case.head_dim).to(case.dtype)
        key, value = wide[:, 1 : case.kv_heads + 1], wide[:, case.kv_heads + 1 :]
        places = torch.arange(length)
        blocks = self.table[i, places // case.block_size].long()
        slots = blocks * case.block_size + places % case.block_size
        padded = torch.cat((slots, torch.tensor([-1])))
        device = wide.to(self.device)
        kv_cache_write(
            device[:, 1 : case.kv_heads + 1],
            device[:, case.kv_heads + 1 :],
            self.pages,
            padded.to(self.device),
            case.layout,
            channel_scales=self.scales,
        )
        self.keys.append(key[:length])
        self.values.append(value[:length])

    def attend(self, query: torch.Tensor) -> torch.Tensor:
        rows = torch.tensor([0, *(rows for rows, _ in self.case.sequences)])
        lengths = torch.tensor([length for _, length in self.case.sequences], dtype=torch.int32)
        out = torch.full_like(query, 7.0).to(self.device)
        paged_attention(
            query.to(self.device),
            self.pages,
            out,
            rows.cumsum(0).to(torch.int32),
            lengths,
            self.table.to(self.device),
            self.case.layout,
            scale=self.case.head_dim**-0.5,
            causal=self.case.causal,
            window=self.case.window,
            channel_scales=self.scales,
        )
        return out.cpu()

    def expected(self, query: torch.Tensor) -> torch.Tensor:
        parts, start = [], 0
        for i, (rows, length) in enumerate(self.case.sequences):
            part = _attend(query[start : start + rows], self.keys[i], self.values[i], self.case)
            parts.append(part)
            start += rows
            assert part.shape[0] == rows
            assert length == self.keys[i].shape[0]
        return torch.cat(parts)


def _attend(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, case: Case
) -> torch.Tensor:
    group = case.heads // case.kv_heads
    key, value = (x.double().repeat_interleave(group, 1) for x in (key, value))
    scores = torch.einsum("nhd,thd->hnt", query.double(), key) * case.head_dim**-0.5
    rows, length = query.shape[0], key.shape[0]
    distance = torch.arange(length)[None] - torch.arange(length - rows, length)[:, None]
    hidden = torch.zeros(rows, length, dtype=torch.bool)
    if case.causal:
        hidden |= distance > 0
    if case.window:
        hidden |= distance.abs() >= case.window
    scores = scores.masked_fill(hidden, -torch.inf)
    return torch.einsum("hnt,thd->nhd", scores.softmax(-1), value)


def _error(case: Case, device: torch.device) -> float:
    cache = Cache(case, device)
    rows = sum(rows for rows, _ in case.sequences)
    query = torch.randn(rows, case.heads, case.head_dim).to(case.dtype)
    want = cache.expected(query)
    got = cache.attend(query).double()
    assert bool(torch.isfinite(got).all())
    return float((got - want).norm() / want.norm())


RAGGED = ((1, 20), (7, 200), (30, 30), (2, 129))

FLOATS = [
    Case(RAGGED),
    Case(RAGGED, dtype=torch.float16),
    Case(RAGGED, heads=9, kv_heads=3, head_dim=64, block_size=64),
    Case(((1, 20), (1, 33)), heads=9, kv_heads=3, head_dim=64, block_size=16),
    Case(RAGGED, window=16),
    Case(((5, 5), (3, 90)), causal=False),
    Case(((1, 1),), heads=8, kv_heads=1),
]


@pytest.mark.parametrize("case", FLOATS, ids=str)
def test_attention_over_pages_without_quantisation(case: Case, device: torch.device) -> None:
    assert _error(case, device) < TOLERANCE[case.kind]


INT8 = [
    # The operator's own constraints hold: it dequantises as it reads.
    Case(((1, 20), (1, 200)), 10, 1, kind=C8S),
    Case(((3, 20), (3, 200)), 10, 1, kind=C8S),
    Case(((1, 20), (1, 200)), 64, 8, kind=C8S),
    Case(((1, 20), (1, 200)), 10, 1, kind=C8D),
    Case(((16, 20), (16, 200)), 10, 1, kind=C8D),
    # They do not: pages are dequantised first.
    Case(RAGGED, 10, 1, kind=C8S),
    Case(RAGGED, kind=C8D),
    Case(((1, 20), (1, 200)), 64, 8, kind=C8D),
    Case(((1, 20), (1, 33)), 9, 3, 64, 16, kind=C8S),
    Case(((1, 20), (1, 200)), 10, 1, kind=C8D, window=16),
]


@pytest.fixture
def no_kernels(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A machine where the AscendC kernels are not built."""
    monkeypatch.setattr(library, "load", lambda: library.Kernels(frozenset()))
    _forget()
    yield
    _forget()


def _forget() -> None:
    attention.operator.forget()
    write.operator.forget()


@pytest.mark.parametrize("case", INT8, ids=str)
def test_attention_over_int8_pages(case: Case, device: torch.device, no_kernels: None) -> None:
    assert _error(case, device) < TOLERANCE[case.kind]


def test_codes_are_those_of_the_reference(device: torch.device, no_kernels: None) -> None:
    """K of c8d pages is turned in bfloat16 on the NPU: codes may differ by one."""
    case = Case(((1, 100),), kind=C8D)
    cache = Cache(case, device)
    block = int(cache.table[0, 0])
    plane = case.kv_heads * case.block_size * case.head_dim
    planes = cache.pages.cpu().flatten()[: 2 * BLOCKS * plane].view(BLOCKS, 2, case.kv_heads, -1)
    fractals = planes[block].view(2, case.kv_heads, case.head_dim // 32, case.block_size, 32)
    codes = fractals.permute(0, 3, 1, 2, 4).flatten(3)[:, :100]  # [2, tokens, kv_heads, head_dim]
    turned = quantise.rotate(cache.keys[0].float()).to(torch.bfloat16)
    for got, rows in zip(codes, (turned, cache.values[0]), strict=True):
        want = quantise.quantise_dynamic(rows).codes
        assert int((got.int() - want.int()).abs().max()) <= 1


def test_no_token_is_written_for_a_negative_slot(device: torch.device) -> None:
    case = Case(())
    pages = torch.full(case.page.pages_shape(3), 7.0, dtype=case.dtype, device=device)
    rows = torch.ones(4, case.kv_heads, case.head_dim, dtype=case.dtype, device=device)
    slots = torch.full((4,), -1, device=device)
    kv_cache_write(rows, rows, pages, slots, case.layout)
    assert bool((pages == 7.0).all())


def test_moving_the_regions_of_a_block_moves_it(device: torch.device) -> None:
    case = Case(((1, 100),), 10, 1, kind=C8D)
    cache = Cache(case, device)
    raw = cache.pages.view(-1).view(torch.uint8)
    old, new = int(cache.table[0, 0]), 1
    for region in case.page.regions(BLOCKS):
        source, target = (region.offset + block * region.stride for block in (old, new))
        raw[target : target + region.nbytes] = raw[source : source + region.nbytes]
        raw[source : source + region.nbytes] = 0
    cache.table[0, 0] = new
    query = torch.randn(1, case.heads, case.head_dim).to(case.dtype)
    got, want = cache.attend(query).double(), cache.expected(query)
    assert float((got - want).norm() / want.norm()) < TOLERANCE[C8D]


REFUSED = [
    (Case(((1, 20),), dtype=torch.float32), r"bf16 and fp16"),
    (Case(((1, 20),), head_dim=80), r"head dimension 80; NZ pages are read for 64 and 128"),
]


@pytest.mark.parametrize(("case", "reason"), REFUSED, ids=lambda value: str(value)[:40])
def test_what_no_path_serves_is_refused(case: Case, reason: str, device: torch.device) -> None:
    with pytest.raises(UnsupportedRequestError, match=reason):
        _error(case, device)


def test_patches_are_refused_without_kernels(device: torch.device, no_kernels: None) -> None:
    page = PageFormat(torch.int8, 128, 2, 128, C8P, arrangement=Arrangement.PLANE_MAJOR)
    pages = torch.zeros(page.pages_shape(2), dtype=torch.int8, device=device)
    rows = torch.zeros(3, 2, 128, dtype=torch.bfloat16, device=device)
    slots = torch.arange(3, device=device)
    scales = torch.ones(2, 2, 128)
    with pytest.raises(UnsupportedRequestError, match="no operator of torch_npu writes patches"):
        kv_cache_write(
            rows,
            rows,
            pages,
            slots,
            page.plane_layout(),
            channel_scales=scales,
            patch_thresholds=[0.1, 0.1],
        )


@pytest.mark.parametrize(
    ("options", "reason"),
    [({"soft_cap": 30.0}, "a soft cap"), ({"alibi_slopes": torch.ones(4)}, "ALiBi")],
    ids=["soft cap", "alibi"],
)
def test_score_options_that_the_operator_lacks_are_refused(
    options: dict, reason: str, device: torch.device
) -> None:
    case = Case(((1, 20),))
    cache = Cache(case, device)
    query = torch.zeros(1, 4, 128, dtype=case.dtype, device=device)
    lengths = (torch.tensor([0, 1], dtype=torch.int32), torch.tensor([20], dtype=torch.int32))
    with pytest.raises(UnsupportedRequestError, match=reason):
        paged_attention(
            query,
            cache.pages,
            torch.empty_like(query),
            *lengths,
            cache.table.to(device),
            case.layout,
            scale=1.0,
            **options,
        )


def test_a_layout_of_runs_is_refused(device: torch.device) -> None:
    case = Case(())
    rows = torch.ones(1, 2, 128, dtype=case.dtype, device=device)
    pages = torch.zeros(case.page.pages_shape(2), dtype=case.dtype, device=device)
    slots = torch.zeros(1, dtype=torch.int64, device=device)
    runs = PageFormat(case.dtype, 128, 2, 128).layout()
    with pytest.raises(ValueError, match=r"6 are needed .* PageFormat\.plane_layout\(\)"):
        kv_cache_write(rows, rows, pages, slots, runs)
    with pytest.raises(ValueError, match=r"contiguous pages, as in vLLM's KV cache layout LBHNC"):
        kv_cache_write(rows, rows, pages.transpose(0, 1)[:2], slots, case.layout)
