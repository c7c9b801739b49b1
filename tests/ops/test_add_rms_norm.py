"""A residual that grows, and its norm: every implementation against float64."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ascend_plugin.ops import native
from ascend_plugin.ops.add_rms_norm import add_rms_norm, reference
from ascend_plugin.ops.native import loader

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
#: Rounding of the result once, and sums in float32.
TOLERANCE = {torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}
ISAS = [status.name for status in native.status() if status.runnable]


def _inputs(
    m: int, k: int, dtype: torch.dtype, seed: int = 0
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(m, k, generator=generator).to(dtype)
    residual = (3 * torch.randn(m, k, generator=generator)).to(dtype)
    return x, residual, torch.rand(k, generator=generator).to(dtype)


def _expected(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, epsilon: float
) -> tuple[torch.Tensor, torch.Tensor]:
    total = residual.double()
    out = torch.empty(x.shape, dtype=torch.float64)
    reference.add_rms_norm(x, total, weight, epsilon, out, compute_dtype=torch.float64)
    return out, total


def _check(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, out: torch.Tensor, *want: object
) -> None:
    normed, total = want
    assert isinstance(normed, torch.Tensor)
    assert isinstance(total, torch.Tensor)
    limit = TOLERANCE[x.dtype]
    torch.testing.assert_close(out.double(), normed, rtol=limit, atol=limit)
    torch.testing.assert_close(residual, total.to(x.dtype), rtol=0, atol=1e-6)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@settings(max_examples=20, deadline=None)
@given(m=st.integers(1, 9), k=st.integers(1, 700), seed=st.integers(0, 99))
def test_native(isa: str, dtype: torch.dtype, m: int, k: int, seed: int) -> None:
    x, residual, weight = _inputs(m, k, dtype, seed)
    want = _expected(x, residual, weight, 1e-5)
    out = torch.full_like(x, torch.nan)
    native.add_rms_norm(loader.load(isa), x, residual, weight, 1e-5, out)
    _check(x, residual, weight, out, *want)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(0, 8), (1, 1), (3, 64), (200, 576)], ids=str)
def test_operator(shape: tuple[int, int], dtype: torch.dtype) -> None:
    """Through the dispatcher too; 200 rows of 576 are shared by threads."""
    x, residual, weight = _inputs(*shape, dtype)
    want = _expected(x, residual, weight, 1e-6)
    twin = residual.clone()
    out = add_rms_norm(x, residual, weight, 1e-6)
    assert out.is_contiguous()
    _check(x, residual, weight, out, *want)
    assert torch.equal(torch.ops.ascend_plugin.add_rms_norm(x, twin, weight, 1e-6), out)
    assert torch.equal(twin, residual)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("policy", ["native", "reference"])
def test_weights_in_float32_and_no_residual(dtype: torch.dtype, policy: str) -> None:
    """As Gemma's norms: 1 + weight has no place in 16 bits."""
    x, residual, _ = _inputs(7, 200, dtype)
    weight = 1 + torch.rand(200) / 100
    kernel = native.load() if policy == "native" else None
    out = torch.full_like(x, torch.nan)
    if kernel is None:
        reference.add_rms_norm(x, None, weight, 1e-5, out)
    else:
        native.add_rms_norm(kernel, x, None, weight, 1e-5, out)
    assert torch.equal(out, add_rms_norm(x, None, weight, 1e-5)) or policy == "reference"
    limit = TOLERANCE[dtype]
    wanted = torch.nn.functional.rms_norm(x.double(), (200,), weight.double(), 1e-5)
    torch.testing.assert_close(out.double(), wanted, rtol=limit, atol=limit)
    want = _expected(x, residual, weight, 1e-5)
    _check(x, residual, weight, add_rms_norm(x, residual, weight, 1e-5), *want)


def test_rows_may_lie_apart_and_neighbours_stay() -> None:
    x, wide, weight = _inputs(5, 96, torch.bfloat16)
    wide[:, :16] = torch.nan
    wide[:, 80:] = torch.nan
    residual = wide[:, 16:80]
    whole = residual.clone()
    out = add_rms_norm(x[:, 8:72], residual, weight[:64])
    assert torch.equal(out, add_rms_norm(x[:, 8:72].contiguous(), whole, weight[:64]))
    assert torch.equal(residual, whole)
    assert wide[:, :16].isnan().all()
    assert wide[:, 80:].isnan().all()


def test_rounds_once() -> None:
    """A norm of the rounded sum, or one that is rounded before the weight, misses a fifth."""
    x, residual, weight = _inputs(64, 576, torch.bfloat16)
    normed, _ = _expected(x, residual, weight, 1e-6)
    out = add_rms_norm(x, residual, weight)
    assert (out == normed.bfloat16()).double().mean() > 0.99


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_bad_row_stays_alone(value: float) -> None:
    x, residual, weight = _inputs(3, 40, torch.float32)
    x[1, 7] = value
    out = add_rms_norm(x, residual, weight)
    assert out[1].isnan().any()
    assert out[[0, 2]].isfinite().all()


def test_opcheck() -> None:
    torch.library.opcheck(
        torch.ops.ascend_plugin.add_rms_norm.default, (*_inputs(3, 16, torch.float32), 1e-6)
    )
    x, _, weight = _inputs(3, 16, torch.bfloat16)
    torch.library.opcheck(
        torch.ops.ascend_plugin.add_rms_norm.default, (x, None, weight.float(), 1e-6)
    )


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"x": torch.zeros(3)}, r"x must be \[rows, columns\]"),
        ({"x": torch.zeros(16, 3).t()}, "x must be contiguous in its last"),
        ({"x": torch.zeros(3, 16).int()}, "x has dtype torch.int32"),
        ({"residual": torch.zeros(3, 17)}, r"residual must have the shape of x, \[3, 16\]"),
        ({"residual": torch.zeros(4, 16)}, r"residual must have the shape of x, \[3, 16\]"),
        ({"residual": torch.zeros(3, 16).half()}, "x and residual must be of one type"),
        ({"weight": torch.ones(16).half()}, "weight must be of the type of x, torch.float32, or"),
        ({"weight": torch.ones(15)}, r"weight must be contiguous \[16\]"),
        ({"weight": torch.ones(32)[::2]}, r"weight must be contiguous \[16\]"),
        ({"epsilon": -1e-6}, "epsilon -1e-06 must not be negative"),
    ],
)
def test_refusals(change: dict[str, object], says: str) -> None:
    x, residual, weight = _inputs(3, 16, torch.float32)
    add_rms_norm(x, residual, weight)  # an accepted call before it must not hide a refusal
    arguments = {"x": x, "residual": residual, "weight": weight, "epsilon": 1e-6} | change
    with pytest.raises(ValueError, match=says):
        add_rms_norm(**arguments)  # type: ignore[arg-type]
