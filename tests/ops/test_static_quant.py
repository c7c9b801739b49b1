"""``static_quant``: activations into int8 with given numbers, on every implementation."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from implementations import threads

from ascend_plugin.ops.static_quant import operator, reference, static_quant

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def _numbers(factor: float, zero: int, dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    return [torch.tensor([factor], dtype=dtype), torch.tensor([zero], dtype=dtype)]


@given(
    m=st.integers(0, 9),
    k=st.integers(1, 1300),
    dtype=st.sampled_from(DTYPES),
    number_dtype=st.sampled_from(DTYPES),
    factor=st.floats(0.01, 5000.0),
    zero=st.integers(-128, 127),
    strided=st.booleans(),
    seed=st.integers(0, 2**16),
)
@settings(max_examples=150)
def test_codes_to_the_bit(
    implementation: str,
    m: int,
    k: int,
    dtype: torch.dtype,
    number_dtype: torch.dtype,
    factor: float,
    zero: int,
    strided: bool,
    seed: int,
) -> None:
    rows = torch.full((m, k + 3 * strided), torch.nan, dtype=dtype)
    rows[:, :k] = torch.randn(m, k, generator=torch.Generator().manual_seed(seed)).to(dtype)
    # The whole range of codes, and a little beyond.
    rows *= 90 / factor
    x, numbers = rows[:, :k], _numbers(factor, zero, number_dtype)
    got = static_quant(x, *numbers)
    assert (got.dtype, got.shape) == (torch.int8, x.shape)
    assert torch.equal(got, reference.quantise(x, *numbers))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_values(implementation: str, dtype: torch.dtype) -> None:
    x = torch.randn(7, 33, generator=torch.Generator().manual_seed(1)).to(dtype)
    got = static_quant(x, *_numbers(40.0, -7))
    want = (x.double() * 40.0 - 7).round().clamp(-128, 127)
    # float32 may round a product that lies next to a half the other way.
    assert ((got.double() - want).abs() <= 1).all()
    assert (got == want).double().mean() > 0.99


def test_product_and_sum_are_rounded_apart(implementation: str) -> None:
    """Next to a half, a fused multiply-add gives other codes."""
    factor, zero = _numbers(3.3, 5)
    halves = (torch.arange(-20, 20).float() + 0.5) / factor
    neighbours = torch.arange(-3, 4, dtype=torch.int32)
    x = (halves.view(torch.int32)[:, None] + neighbours).view(torch.float32)
    want = reference.quantise(x, factor, zero)
    fused = (x.double() * factor.double() + zero.double()).float().round()
    assert not torch.equal(want.float(), fused)
    assert torch.equal(static_quant(x, factor, zero), want)


def test_rounds_to_even_and_saturates(implementation: str) -> None:
    x = torch.tensor([[0.25, 0.75, 1.25, -0.25, -0.75, 1e9, -1e9, 0.0]])
    assert static_quant(x, *_numbers(2.0, 3)).tolist() == [[4, 4, 6, 2, 2, 127, -128, 3]]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_odd_numbers(implementation: str, dtype: torch.dtype) -> None:
    finfo = torch.finfo(dtype)
    x = torch.tensor([[torch.nan, torch.inf, -torch.inf, finfo.max, finfo.min, finfo.tiny]])
    x = x.to(dtype).repeat(1, 7)
    for factor in (1.0, 3e38):  # the latter overflows
        got = static_quant(x, *_numbers(factor, 5)).view(7, 6)
        assert torch.equal(got, reference.quantise(x, *_numbers(factor, 5)).view(7, 6))
        assert got[0, :5].tolist() == [0, 127, -128, 127, -128]
        assert bool((got == got[0]).all()), "every lane alike"


def test_rows_may_lie_apart(implementation: str) -> None:
    wide = torch.full((5, 64), torch.nan)
    wide[:, 16:48] = torch.randn(5, 32)
    apart, numbers = wide[:, 16:48], _numbers(30.0, 0)
    assert torch.equal(static_quant(apart, *numbers), static_quant(apart.clone(), *numbers))


@pytest.mark.parametrize("shape", [(0, 8), (1, 1), (1, 5000), (600, 70)], ids=str)
@pytest.mark.parametrize("count", [1, 3])
def test_threads_and_sizes(implementation: str, shape: tuple[int, int], count: int) -> None:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    with threads(count):
        got = static_quant(x, *_numbers(40.0, 9))
    assert torch.equal(got, reference.quantise(x, *_numbers(40.0, 9)))


def test_opcheck(implementation: str) -> None:
    arguments = (torch.randn(3, 16), *_numbers(20.0, 5))
    torch.library.opcheck(torch.ops.ascend_plugin.static_quant.default, arguments)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ((torch.zeros(3), *_numbers(1.0, 0)), r"x must be \[rows, columns\]"),
        ((torch.zeros(3, 4).t(), *_numbers(1.0, 0)), "x must be contiguous in its last"),
        ((torch.zeros(3, 4).int(), *_numbers(1.0, 0)), "x has dtype torch.int32"),
        ((torch.zeros(3, 4), torch.ones(2), torch.zeros(1)), r"factor must be .* \[1\], got"),
        ((torch.zeros(3, 4), torch.ones(1), torch.zeros(1).int()), "zero must be float32"),
    ],
)
def test_refusals(arguments: tuple[torch.Tensor, ...], says: str) -> None:
    operator.forget()
    static_quant(torch.zeros(3, 4), *_numbers(1.0, 0))
    with pytest.raises(ValueError, match=says):
        static_quant(*arguments)
