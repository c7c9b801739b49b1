"""``dynamic_quant`` and ``quant_matmul``: exact integers on every implementation."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from implementations import threads

from ascend_plugin.ops import dynamic_quant as quant_op
from ascend_plugin.ops import quant_matmul as int8_op
from ascend_plugin.ops.dynamic_quant import dynamic_quant, reference
from ascend_plugin.ops.quant_matmul import MAX_K, pack_int8, quant_matmul
from ascend_plugin.ops.weight_quant_matmul import pack

DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def _same_bits(one: torch.Tensor, other: torch.Tensor) -> bool:
    return torch.equal(one.nan_to_num(-1.0), other.nan_to_num(-1.0))


@given(
    m=st.integers(0, 9),
    k=st.integers(1, 1300),
    dtype=st.sampled_from(DTYPES),
    symmetric=st.booleans(),
    strided=st.booleans(),
    seed=st.integers(0, 2**16),
)
@settings(max_examples=150)
def test_quantisation_to_the_bit(
    implementation: str,
    m: int,
    k: int,
    dtype: torch.dtype,
    symmetric: bool,
    strided: bool,
    seed: int,
) -> None:
    generator = torch.Generator().manual_seed(seed)
    rows = torch.full((m, k + 3 * strided), torch.nan, dtype=dtype)
    offset = torch.randn(m, 1, generator=generator)
    rows[:, :k] = (torch.randn(m, k, generator=generator) * 4 + offset).to(dtype)
    x = rows[:, :k]
    found, wanted = dynamic_quant(x, symmetric), reference.quantise(x, symmetric)
    assert torch.equal(found.codes, wanted.codes)
    assert torch.equal(found.scales, wanted.scales)
    assert (found.zeros is None) is symmetric
    if not symmetric:
        assert torch.equal(found.zeros, wanted.zeros)


@pytest.mark.parametrize("symmetric", [True, False])
def test_the_error_is_at_most_half_a_scale(implementation: str, symmetric: bool) -> None:
    x = torch.randn(50, 300) * 3 + 1
    found = dynamic_quant(x, symmetric)
    zeros = 0 if found.zeros is None else found.zeros[:, None]
    error = (found.codes - zeros) * found.scales[:, None] - x
    # Where both ends round outwards, a zero point leaves one code too few.
    allowed = 0.5001 if symmetric else 1.0001
    assert bool((error.abs() <= allowed * found.scales[:, None]).all())


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_odd_rows(implementation: str, dtype: torch.dtype, symmetric: bool) -> None:
    x = torch.zeros(7, 40, dtype=dtype)
    x[1, 3], x[2, 39], x[3, 0] = torch.nan, torch.inf, -torch.inf
    x[4, 5] = torch.finfo(dtype).tiny
    x[5] = torch.finfo(dtype).max
    x[6], x[6, ::2] = torch.finfo(dtype).max, torch.finfo(dtype).min
    found, wanted = dynamic_quant(x, symmetric), reference.quantise(x, symmetric)
    assert torch.equal(found.codes, wanted.codes)
    assert _same_bits(found.scales, wanted.scales)
    assert found.scales.isnan().tolist() == [False, True, True, True, False, False, False]
    assert not bool(found.codes[1:4].any())


@given(
    m=st.integers(0, 5),
    k=st.integers(1, 700),
    dtype=st.sampled_from(DTYPES),
    symmetric=st.booleans(),
    exponent=st.integers(-40, 15),
    seed=st.integers(0, 2**16),
)
@settings(max_examples=150)
def test_rows_are_the_references(
    implementation: str,
    m: int,
    k: int,
    dtype: torch.dtype,
    symmetric: bool,
    exponent: int,
    seed: int,
) -> None:
    generator = torch.Generator().manual_seed(seed)
    wide = torch.randn(m, k + 3, generator=generator) * 2.0**exponent
    x = wide.to(dtype)[:, :k]  # rows at a distance
    found, wanted = dynamic_quant(x, symmetric), reference.quantise(x, symmetric)
    assert torch.equal(found.codes, wanted.codes)
    assert _same_bits(found.scales, wanted.scales)
    assert symmetric or torch.equal(found.zeros, wanted.zeros)


def _exact(x: torch.Tensor, w: torch.Tensor, zero: torch.Tensor | None) -> torch.Tensor:
    """Return the integers in float64, which holds all of them."""
    product = x.double() @ w.double().T
    return product if zero is None else product - zero.double()[:, None] * w.double().sum(1)


@given(
    m=st.sampled_from((0, 1, 2, 3, 4, 5, 8, 12, 13, 26, 100)),
    n=st.integers(1, 100),
    k=st.integers(1, 600),
    per_row=st.booleans(),
    zero=st.booleans(),
    quant_bias=st.booleans(),
    seed=st.integers(0, 2**16),
)
@settings(max_examples=150)
def test_integers_are_exact(
    implementation: str,
    m: int,
    n: int,
    k: int,
    per_row: bool,
    zero: bool,
    quant_bias: bool,
    seed: int,
) -> None:
    generator = torch.Generator().manual_seed(seed)

    def integers(low: int, high: int, *shape: int) -> torch.Tensor:
        return torch.randint(low, high, shape, generator=generator)

    x, w = integers(-128, 128, m, k).to(torch.int8), integers(-128, 128, n, k).to(torch.int8)
    rows = m if per_row and m else 1
    x_zero = integers(-128, 128, rows).int() if zero else None
    added = integers(-(2**20), 2**20, n).int() if quant_bias else None
    expected = _exact(x, w, x_zero) + (0 if added is None else added.double())
    result = quant_matmul(
        x,
        pack_int8(w),
        torch.ones(n),
        torch.ones(rows),
        x_zero=x_zero,
        quant_bias=added,
        out_dtype=torch.float32,
    )
    assert torch.equal(result, expected.float())  # rounded to float32 once


@pytest.mark.parametrize("value", [-128, 127])
def test_the_largest_sums(implementation: str, value: int) -> None:
    """No product and no sum saturates, at the ends of the range and many k."""
    k = MAX_K
    x = torch.tensor([[-128], [127]], dtype=torch.int8).repeat(1, k)
    w = torch.full((33, k), value, dtype=torch.int8)
    zero = torch.tensor([127, -128], dtype=torch.int32)
    result = quant_matmul(
        x, pack_int8(w), torch.ones(33), torch.ones(1), x_zero=zero, out_dtype=torch.float32
    )
    assert torch.equal(result, _exact(x, w, zero).float())


@pytest.mark.parametrize("out_dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bias_dtype", ["same", "float32"])
def test_scales_and_bias(implementation: str, out_dtype: torch.dtype, bias_dtype: str) -> None:
    w = torch.randint(-127, 128, (70, 256), dtype=torch.int8)
    x = torch.randint(-127, 128, (15, 256), dtype=torch.int8)
    weight_scale, x_scale = torch.rand(70) * 0.01, torch.rand(15) * 0.1
    bias = torch.randn(70).to(out_dtype if bias_dtype == "same" else torch.float32)
    result = quant_matmul(x, pack_int8(w), weight_scale, x_scale, bias=bias, out_dtype=out_dtype)
    exact = _exact(x, w, None) * x_scale.double()[:, None] * weight_scale.double() + bias.double()
    eps = torch.finfo(out_dtype).eps
    torch.testing.assert_close(result.double(), exact, rtol=2 * eps, atol=4 * eps)


@pytest.mark.parametrize("n", [64, 75])
@pytest.mark.parametrize("out_dtype", [torch.bfloat16, torch.float16], ids=str)
def test_results_are_rounded_as_torch_rounds(
    implementation: str, out_dtype: torch.dtype, n: int
) -> None:
    """Of every size: subnormal, normal, too large, infinite and NaN."""
    w = torch.randint(-128, 128, (n, 33), dtype=torch.int8)
    x = torch.randint(-128, 128, (13, 33), dtype=torch.int8)
    scale = 2.0 ** torch.linspace(-148, 127, n)
    scale[5], scale[n - 1] = torch.nan, torch.inf
    packed = pack_int8(w)
    exact = quant_matmul(x, packed, scale, torch.ones(1), out_dtype=torch.float32)
    result = quant_matmul(x, packed, scale, torch.ones(1), out_dtype=out_dtype)
    magnitude = exact.abs()
    assert bool(((magnitude > 0) & (magnitude < torch.finfo(out_dtype).tiny)).any())
    torch.testing.assert_close(result, exact.to(out_dtype), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("count", [1, 2, 5])
def test_threads_and_many_rows(implementation: str, count: int) -> None:
    w = torch.randint(-128, 128, (200, 1100), dtype=torch.int8)
    packed = pack_int8(w)
    with threads(count):
        for m in (1, 100, 800):
            x = torch.randint(-128, 128, (m, 1100), dtype=torch.int8)
            result = quant_matmul(
                x, packed, torch.ones(200), torch.ones(1), out_dtype=torch.float32
            )
            assert torch.equal(result, _exact(x, w, None).float())
            rows = torch.randn(m, 1100)
            assert torch.equal(dynamic_quant(rows).codes, reference.quantise(rows, True).codes)


def test_one_weight_serves_integer_and_float_activations() -> None:
    w = torch.randint(-127, 128, (50, 96), dtype=torch.int8)
    as_float = pack(w, torch.rand(50, 1), bits=8, group=96)
    assert torch.equal(pack_int8(w).weight, as_float.weight)


def test_poisoned_rows_beyond_the_view(implementation: str) -> None:
    w = torch.randint(-128, 128, (40, 64), dtype=torch.int8)
    wide = torch.full((3, 90), -77, dtype=torch.int8)
    wide[:, :64] = torch.randint(-128, 128, (3, 64), dtype=torch.int8)
    x = wide[:, :64]
    result = quant_matmul(x, pack_int8(w), torch.ones(40), torch.ones(1), out_dtype=torch.float32)
    assert torch.equal(result, _exact(x, w, None).float())


REFUSALS = {
    "x dtype": (lambda a: a | {"x": a["x"].short()}, r"x must be int8, got torch.int16; quantise"),
    "x rank": (lambda a: a | {"x": a["x"][0]}, r"x must be \[rows, columns\]"),
    "width": (lambda a: a | {"x": a["x"][:, :4].contiguous()}, r"weight must be contiguous"),
    "weight_scale": (
        lambda a: a | {"weight_scale": a["weight_scale"].double()},
        r"weight_scale must be float32 \[40\], got torch.float64 \[40\]",
    ),
    "column_sums": (lambda a: a | {"column_sums": a["column_sums"][:40]}, r"int32 \[64\], got"),
    "x_scale": (
        lambda a: a | {"x_scale": torch.ones(2)},
        r"x_scale must be float32 \[1\] or \[3\], got torch.float32 \[2\]",
    ),
    "x_zero": (lambda a: a | {"x_zero": torch.ones(3)}, r"x_zero must be int32 \[1\] or \[3\]"),
    "quant_bias": (lambda a: a | {"quant_bias": torch.ones(40)}, r"quant_bias must be int32 \[40"),
    "bias": (lambda a: a | {"bias": torch.ones(41)}, r"bias must be bfloat16 or float32 \[40\]"),
    "out_dtype": (lambda a: a | {"out_dtype": torch.int32}, r"the result has dtype torch.int32"),
}


def _arguments() -> dict[str, object]:
    w = pack_int8(torch.ones(40, 64, dtype=torch.int8))
    return {
        "x": torch.ones(3, 64, dtype=torch.int8),
        "weight": w.weight,
        "column_sums": w.column_sums,
        "weight_scale": torch.ones(40),
        "x_scale": torch.ones(1),
        "x_zero": None,
        "quant_bias": None,
        "bias": None,
        "out_dtype": torch.bfloat16,
    }


@pytest.mark.parametrize("name", REFUSALS)
def test_refusals(name: str) -> None:
    replaced, message = REFUSALS[name]
    int8_op.operator.forget()
    torch.ops.ascend_plugin.quant_matmul(**_arguments())
    with pytest.raises(ValueError, match=message):
        torch.ops.ascend_plugin.quant_matmul(**replaced(_arguments()))


def test_packing_refuses() -> None:
    with pytest.raises(ValueError, match=r"weight must be int8 \[n, k\].*got torch.uint8 \[4, 4\]"):
        pack_int8(torch.ones(4, 4, dtype=torch.uint8))
    with pytest.raises(ValueError, match=rf"k={MAX_K + 1} products may not fit into 32 bits"):
        pack_int8(torch.ones(1, MAX_K + 1, dtype=torch.int8))


@pytest.mark.parametrize(
    "x, message",
    [
        (torch.ones(3, 4, dtype=torch.int8), r"x has dtype torch.int8; allowed are"),
        (torch.ones(4), r"x must be \[rows, columns\]"),
        (torch.ones(3, 8)[:, ::2], r"x must be contiguous in its last dimension"),
    ],
)
def test_dynamic_quant_refuses(x: torch.Tensor, message: str) -> None:
    quant_op.operator.forget()
    with pytest.raises(ValueError, match=message):
        dynamic_quant(x)


def test_opcheck(implementation: str) -> None:
    arguments = _arguments()
    arguments |= {"x_zero": torch.ones(3, dtype=torch.int32), "bias": torch.ones(40)}
    torch.library.opcheck(torch.ops.ascend_plugin.quant_matmul.default, tuple(arguments.values()))
    for symmetric in (True, False):
        torch.library.opcheck(
            torch.ops.ascend_plugin.dynamic_quant.default, (torch.randn(3, 40), symmetric)
        )
