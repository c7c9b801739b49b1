"""Rows times weights as they lie: every implementation against float64."""

from __future__ import annotations

import ctypes
import mmap

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from implementations import threads

from ascend_plugin.ops import native
from ascend_plugin.ops.dense_matmul import dense_matmul, reference
from ascend_plugin.ops.dense_matmul.native import FEW_ROWS
from ascend_plugin.ops.native import loader

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
#: Rounding of the result once, and sums in float32, of elements of about 1.
TOLERANCE = {torch.float32: 2e-5, torch.float16: 1e-3, torch.bfloat16: 8e-3}
ISAS = [status.name for status in native.status() if status.runnable]


def _inputs(
    m: int, n: int, k: int, dtype: torch.dtype, seed: int = 0
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(m, k, generator=generator).to(dtype)
    weights = (torch.randn(n, k, generator=generator) / k**0.5).to(dtype)
    return x, weights, torch.randn(n, generator=generator).to(dtype)


def _check(
    out: torch.Tensor, x: torch.Tensor, weights: torch.Tensor, bias: torch.Tensor | None
) -> None:
    want = reference.dense_matmul(x, weights, bias, compute_dtype=torch.float64)
    limit = TOLERANCE[x.dtype]
    assert out.dtype == x.dtype
    torch.testing.assert_close(out.double(), want, rtol=limit, atol=limit)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@settings(max_examples=25, deadline=None)
@given(
    m=st.integers(1, 40),
    n=st.integers(1, 70),
    k=st.integers(1, 300),
    shift=st.booleans(),
    seed=st.integers(0, 99),
)
def test_native(
    isa: str, dtype: torch.dtype, m: int, n: int, k: int, shift: bool, seed: int
) -> None:
    x, weights, vector = _inputs(m, n, k, dtype, seed)
    bias = vector if shift else None
    out = torch.full((m, n), torch.nan, dtype=dtype)
    native.dense(loader.load(isa), x, weights, bias, out)
    _check(out, x, weights, bias)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_many_rows_by_panels(isa: str, dtype: torch.dtype) -> None:
    """More rows than the kernel reads the weights once for."""
    x, weights, bias = _inputs(150, 9, 8200, dtype)
    out = torch.full((150, 9), torch.nan, dtype=dtype)
    native.dense(loader.load(isa), x, weights, bias, out)
    _check(out, x, weights, bias)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "shape", [(0, 8, 16), (1, 1, 1), (3, 64, 33), (5, 700, 576), (FEW_ROWS + 1, 40, 96)], ids=str
)
@pytest.mark.parametrize("count", [1, 2])
def test_operator(
    implementation: str, shape: tuple[int, int, int], dtype: torch.dtype, count: int
) -> None:
    """Through the dispatcher too; 700 columns of 576 are shared by threads."""
    x, weights, bias = _inputs(*shape, dtype)
    with threads(count):
        out = dense_matmul(x, weights, bias)
        assert out.shape == (shape[0], shape[1])
        assert out.is_contiguous()
        _check(out, x, weights, bias)
        _check(dense_matmul(x, weights), x, weights, None)
        assert torch.equal(torch.ops.ascend_plugin.dense_matmul(x, weights, bias), out)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("k", [40, 64, 95])
def test_rows_may_lie_apart_and_neighbours_stay_out(
    implementation: str, dtype: torch.dtype, k: int
) -> None:
    x, weights, bias = _inputs(7, 13, 3 * k, dtype)
    for wide in (x, weights):
        wide[:, :k] = torch.nan
        wide[:, 2 * k :] = torch.nan
    inner = slice(k, 2 * k)
    out = dense_matmul(x[:, inner], weights[:, inner], bias)
    _check(out, x[:, inner], weights[:, inner], bias)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("k", [1, 31, 45, 64])
def test_the_last_row_may_end_a_page(isa: str, dtype: torch.dtype, k: int) -> None:
    """What follows the rows cannot be read: the process would end."""
    x, weights, _ = _inputs(3, 6, k, dtype)
    out = torch.empty(3, 6, dtype=dtype)
    with _Guarded(x) as rows, _Guarded(weights) as columns:
        native.dense(loader.load(isa), rows.tensor, columns.tensor, None, out)
    _check(out, x, weights, None)


class _Guarded:
    """A copy of a tensor that ends where a page without access begins."""

    def __init__(self, source: torch.Tensor) -> None:
        size = source.numel() * source.itemsize
        pages = -(-size // mmap.PAGESIZE)
        self._map = mmap.mmap(-1, (pages + 1) * mmap.PAGESIZE)
        whole = torch.frombuffer(self._map, dtype=torch.uint8)
        begin = pages * mmap.PAGESIZE - size
        self.tensor = whole[begin : begin + size].view(source.dtype).view(source.shape)
        self.tensor.copy_(source)
        self._guard = whole.data_ptr() + pages * mmap.PAGESIZE

    def __enter__(self) -> _Guarded:
        self._protect(0)
        return self

    def __exit__(self, *_: object) -> None:
        self._protect(mmap.PROT_READ | mmap.PROT_WRITE)

    def _protect(self, access: int) -> None:
        libc = ctypes.CDLL(None, use_errno=True)
        done = libc.mprotect(ctypes.c_void_p(self._guard), ctypes.c_size_t(mmap.PAGESIZE), access)
        assert done == 0, ctypes.get_errno()


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_bad_row_stays_alone(implementation: str, dtype: torch.dtype, value: float) -> None:
    x, weights, bias = _inputs(7, 9, 70, dtype)
    good = dense_matmul(x, weights, bias)
    x[3, 66] = value
    out = dense_matmul(x, weights, bias)
    assert not out[3].isfinite().any()
    others = [0, 1, 2, 4, 5, 6]
    assert torch.equal(out[others], good[others])


def test_rounds_once() -> None:
    """A product that is rounded before the bias is added misses a fifth."""
    x, weights, bias = _inputs(16, 64, 576, torch.bfloat16)
    want = reference.dense_matmul(x, weights, bias, compute_dtype=torch.float64)
    out = dense_matmul(x, weights, bias)
    assert (out == want.bfloat16()).double().mean() > 0.99


def test_a_row_does_not_depend_on_the_batch() -> None:
    """Nor on where it stands in it, up to the number of rows that one kernel serves."""
    x, weights, bias = _inputs(FEW_ROWS, 33, 200, torch.bfloat16)
    whole = dense_matmul(x, weights, bias)
    for m in (1, 2, 7, 31):
        assert torch.equal(dense_matmul(x[:m], weights, bias), whole[:m])


@pytest.mark.parametrize("m", [0, 3])
def test_opcheck(m: int) -> None:
    x, weights, bias = _inputs(m, 5, 16, torch.float32)
    for given_bias in (bias, None):
        torch.library.opcheck(
            torch.ops.ascend_plugin.dense_matmul.default, (x, weights, given_bias)
        )


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"x": torch.zeros(16)}, r"x must be \[rows, columns\]"),
        ({"x": torch.zeros(16, 3).t()}, "x must be contiguous in its last"),
        ({"x": torch.zeros(3, 16).int()}, "x has dtype torch.int32"),
        ({"x": torch.zeros(3, 16).half()}, "must be of one type"),
        ({"x": torch.zeros(3, 17)}, r"weights must be \[columns, 17\]"),
        ({"weights": torch.zeros(5)}, r"weights must be \[rows, columns\]"),
        ({"weights": torch.zeros(16, 5).t()}, "weights must be contiguous in its last"),
        ({"bias": torch.ones(4)}, r"bias must be float32 \[5\]"),
        ({"bias": torch.ones(5).half()}, r"bias must be float32 \[5\]"),
        ({"bias": torch.ones(10)[::2]}, "bias must be contiguous"),
    ],
)
def test_refusals(change: dict[str, torch.Tensor], says: str) -> None:
    x, weights, bias = _inputs(3, 5, 16, torch.float32)
    dense_matmul(x, weights, bias)  # an accepted call before it must not hide a refusal
    arguments = {"x": x, "weights": weights, "bias": bias} | change
    with pytest.raises(ValueError, match=says):
        dense_matmul(**arguments)
