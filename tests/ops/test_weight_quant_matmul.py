"""``weight_quant_matmul``: every implementation against float64, and what it refuses."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from implementations import threads
from linear_cases import TOLERANCES, Linear, draw, relative_error

from ascend_plugin.ops import packed_weight
from ascend_plugin.ops.weight_quant_matmul import operator, pack, weight_quant_matmul

DTYPES = (torch.bfloat16, torch.float16, torch.float32)


@st.composite
def linears(draw: st.DrawFn) -> Linear:
    group = draw(st.sampled_from((0, 0, 32, 64, 96, 128)))
    return Linear(
        m=draw(st.sampled_from((0, 1, 2, 3, 4, 5, 7, 8, 9, 12, 13, 17, 30))),
        n=draw(st.integers(1, 130)),
        k=group * draw(st.integers(1, 6)) if group else draw(st.integers(1, 700)),
        group=group,
        bits=draw(st.sampled_from((4, 8))),
        unsigned=draw(st.booleans()),
        zeros=draw(st.booleans()),
        bias=draw(st.sampled_from(("", "same", "float32"))),
        dtype=draw(st.sampled_from(DTYPES)),
        scale_dtype=draw(st.sampled_from(DTYPES)),
        strided=draw(st.booleans()),
        seed=draw(st.integers(0, 2**16)),
    )


def _check(linear: Linear) -> None:
    call = draw(linear)
    result = weight_quant_matmul(call.x, call.packed, call.bias)
    assert (result.dtype, list(result.shape)) == (linear.dtype, [linear.m, linear.n])
    # Sums of zero points cancel: what float32 loses grows with them, not with the result.
    tolerance = TOLERANCES[linear.dtype] * (4 if linear.zeros or linear.unsigned else 1)
    assert relative_error(result, call.oracle()) <= tolerance


@given(linear=linears())
@settings(max_examples=150)
def test_any_call_equals_float64(implementation: str, linear: Linear) -> None:
    _check(linear)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("m", [96, 129, 800])
def test_many_rows(implementation: str, bits: int, m: int) -> None:
    """Enough rows for slices of k, tiles and more than one round of panels."""
    _check(Linear(m=m, n=100, k=1088, group=64, bits=bits, zeros=True, bias="same"))
    _check(Linear(m=m // 3, n=33, k=1030, group=0, bits=bits, dtype=torch.float32))


@pytest.mark.parametrize("shape", [(960, 576), (576, 1536), (3072, 576)])
def test_shapes_of_a_small_model(implementation: str, shape: tuple[int, int]) -> None:
    n, k = shape
    for m in (1, 8):
        _check(Linear(m=m, n=n, k=k, group=64))


@pytest.mark.parametrize("count", [1, 2, 5])
def test_thread_counts(implementation: str, count: int) -> None:
    with threads(count):
        for m in (1, 40):
            _check(Linear(m=m, n=530, k=512, group=128, zeros=True))


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_threads_with_rows_of_their_own(implementation: str, dtype: torch.dtype, bits: int) -> None:
    with threads(3):
        _check(Linear(m=301, n=70, k=128, group=64, zeros=True, dtype=dtype, bits=bits))


def test_exact_integers(implementation: str) -> None:
    """Integers, powers of two as scales: every intermediate result is exact, so is the product."""
    linear = Linear(m=13, n=64, k=256, group=32, dtype=torch.float32)
    for bits in (4, 8):
        call = draw(dataclasses.replace(linear, bits=bits, zeros=True))
        call.packed.scales.fill_(0.25)
        dense = packed_weight.dequantise(*_fields(call.packed), dtype=torch.float64)
        x = torch.randint(-200, 200, call.x.shape).float()
        expected = x.double() @ dense.T
        assert torch.equal(weight_quant_matmul(x, call.packed).double(), expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
def test_wide_activations_lose_nothing(implementation: str, dtype: torch.dtype) -> None:
    """One product per row: only the type of ``x`` decides how exact it is."""
    codes = torch.full((32, 32), 0, dtype=torch.int8)
    codes[:, 0] = 1
    packed = pack(codes, torch.ones(32, 1), bits=4, group=32)
    x = torch.zeros(6, 32, dtype=dtype)
    x[:, 0] = torch.tensor([torch.pi, -1e-3, 65504.0, 1.0 + 2**-10, 0.0, -7.77]).to(dtype)
    assert torch.equal(weight_quant_matmul(x, packed), x[:, :1].expand(6, 32))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("poison", [torch.nan, torch.inf])
def test_what_is_not_finite_stays_in_its_row(
    implementation: str, dtype: torch.dtype, poison: float
) -> None:
    call = draw(Linear(m=5, dtype=dtype))
    clean = weight_quant_matmul(call.x, call.packed)
    x = call.x.clone()
    x[2, 7] = poison
    result = weight_quant_matmul(x, call.packed)
    others = [0, 1, 3, 4]
    torch.testing.assert_close(result[others], clean[others])
    column = call.dense[:, 7] != 0  # 0 times infinity may be anything
    assert not bool(result[2][column].isfinite().any())


def test_a_row_does_not_depend_on_the_others(implementation: str) -> None:
    """Batches of up to 8 rows give what single rows give, to rounding of the result."""
    call = draw(Linear(m=8, n=64, k=512, group=64))
    together = weight_quant_matmul(call.x, call.packed)
    for row in range(8):
        alone = weight_quant_matmul(call.x[row : row + 1], call.packed)
        torch.testing.assert_close(alone, together[row : row + 1], rtol=8e-3, atol=2e-2)


def test_poisoned_padding_of_scales_is_not_seen(implementation: str) -> None:
    call = draw(Linear(n=40))
    call.packed.scales[1, :, 8:] = torch.nan  # columns 40 to 63
    result = weight_quant_matmul(call.x, call.packed)
    assert relative_error(result, call.oracle()) <= TOLERANCES[torch.bfloat16]


def _fields(packed: packed_weight.PackedWeight) -> tuple[object, ...]:
    p = packed
    return p.weight, p.scales, p.zeros, p.n, p.k, p.group, p.bits


@given(
    n=st.integers(1, 80), k=st.integers(1, 70), bits=st.sampled_from((4, 8)), seed=st.integers(0, 9)
)
def test_packing_goes_back(n: int, k: int, bits: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    half = 1 << (bits - 1)
    codes = torch.randint(-half, half, (n, k), generator=generator).to(torch.int8)
    words = packed_weight.pack_codes(codes, bits)
    assert list(words.shape) == [-(-n // 32), -(-k * bits // 32), 32]
    assert torch.equal(packed_weight.unpack_codes(words, n, k, bits), codes)


def test_packing_many_columns_goes_back() -> None:
    codes = torch.arange(2100 * 9).remainder(16).sub(8).view(2100, 9).to(torch.int8)
    assert torch.equal(
        packed_weight.unpack_codes(packed_weight.pack_codes(codes, 4), 2100, 9, 4), codes
    )


def test_unsigned_codes_mean_the_same_as_signed_ones() -> None:
    signed = torch.arange(-8, 8).repeat(32, 4).to(torch.int8)  # [32, 64]
    scales = torch.rand(32, 2)
    zeros = torch.arange(64).view(32, 2) % 16 - 8
    one = pack(signed, scales, zeros, bits=4, group=32)
    other = pack((signed + 8).to(torch.uint8), scales, zeros + 8, bits=4, group=32)
    assert torch.equal(one.weight, other.weight)
    assert torch.equal(one.zeros, other.zeros)
    symmetric = pack((signed + 8).to(torch.uint8), scales, bits=4, group=32)
    assert symmetric.zeros is None
    assert torch.equal(symmetric.weight, one.weight)


@pytest.mark.parametrize("bits", [4, 8])
def test_a_packed_weight_is_no_larger_than_its_codes(bits: int) -> None:
    codes = torch.zeros(4096, 1024, dtype=torch.int8)
    packed = pack(codes, torch.ones(4096, 16, dtype=torch.bfloat16), bits=bits, group=64)
    assert packed.nbytes == 4096 * 1024 * bits // 8 + 4096 * 16 * 2


PACK_REFUSALS = {
    "codes dtype": (
        lambda a: a | {"codes": a["codes"].int()},
        r"codes must be int8 or uint8 \[n, k\] and not empty, got torch.int32 \[32, 64\]",
    ),
    "codes empty": (lambda a: a | {"codes": a["codes"][:0]}, r"not empty, got torch.int8 \[0, 64"),
    "bits": (lambda a: a | {"bits": 3}, r"bits=3 is not supported; allowed are 4, 8"),
    "group": (
        lambda a: a | {"group": 48},
        r"group=48 does not cut k=64 into equal parts; allowed are multiples of 32 that divide k",
    ),
    "scales shape": (
        lambda a: a | {"scales": a["scales"].T},
        r"scales must be \[32, 2\] \(columns, groups\), got \[2, 32\]; transpose it",
    ),
    "scales dtype": (lambda a: a | {"scales": a["scales"].double()}, r"scales has dtype torch.flo"),
    "range": (
        lambda a: a | {"codes": a["codes"] + 8},
        r"codes has values from 8 to 8; 4 bits of signed codes hold -8 to 7",
    ),
    "zeros range": (
        lambda a: a | {"zeros": torch.full((32, 2), -9)},
        r"zeros has values from -9 to -9; 4 bits of signed codes hold -8 to 7",
    ),
    "zeros dtype": (
        lambda a: a | {"zeros": torch.zeros(32, 2)},
        r"zeros must be integers, got torch.float32; round them first",
    ),
}


@pytest.mark.parametrize("name", PACK_REFUSALS)
def test_pack_refuses(name: str) -> None:
    replaced, message = PACK_REFUSALS[name]
    arguments = {
        "codes": torch.zeros(32, 64, dtype=torch.int8),
        "scales": torch.ones(32, 2),
        "bits": 4,
        "group": 32,
    }
    with pytest.raises(ValueError, match=message):
        pack(**replaced(arguments))


REFUSALS = {
    "x dtype": (lambda a: a | {"x": a["x"].double()}, r"x has dtype torch.float64; allowed are"),
    "x rank": (lambda a: a | {"x": a["x"][None]}, r"x must be \[rows, columns\].*got \[1, 3, 128"),
    "x stride": (
        lambda a: a | {"x": a["x"].repeat_interleave(2, -1)[:, ::2]},
        r"x must be contiguous in its last dimension; call \.contiguous\(\)",
    ),
    "x width": (
        lambda a: a | {"x": a["x"][:, :96].contiguous()},
        r"weight must be contiguous torch.int32 \[3, 12, 32\] for n=70, got torch.int32 \[3, 16",
    ),
    "n": (lambda a: a | {"n": 100}, r"weight must be contiguous torch.int32 \[4, 16, 32\]"),
    "bits": (lambda a: a | {"bits": 5}, r"bits=5 is not supported; allowed are 4, 8"),
    "group": (lambda a: a | {"group": 100}, r"group=100 does not cut k=128 into equal parts"),
    "scales": (
        lambda a: a | {"scales": a["scales"][:, :1]},
        r"scales must be contiguous torch.bfloat16 \[3, 4, 32\] for n=70, got .*\[3, 1, 32\]",
    ),
    "zeros": (
        lambda a: a | {"zeros": a["scales"].int()},
        r"zeros must be contiguous torch.int8 \[3, 4, 32\] for n=70, got torch.int32",
    ),
    "bias dtype": (
        lambda a: a | {"bias": torch.zeros(70).half()},
        r"bias must be bfloat16 or float32 \[70\], got torch.float16 \[70\]",
    ),
    "bias shape": (lambda a: a | {"bias": torch.zeros(71)}, r"float32 \[70\], got .* \[71\]"),
    "bias stride": (
        lambda a: a | {"bias": torch.zeros(140)[::2]},
        r"bias must be contiguous; call \.contiguous\(\)",
    ),
}


@pytest.mark.parametrize("warm", [False, True], ids=["first call", "after a good call"])
@pytest.mark.parametrize("name", REFUSALS)
def test_refusals(name: str, warm: bool) -> None:
    replaced, message = REFUSALS[name]
    call = draw(Linear())
    operator.forget()
    if warm:
        weight_quant_matmul(call.x, call.packed)
    p = call.packed
    arguments = {
        "x": call.x,
        "weight": p.weight,
        "scales": p.scales,
        "zeros": None,
        "bias": None,
        "n": p.n,
        "group": p.group,
        "bits": p.bits,
    }
    with pytest.raises(ValueError, match=message):
        torch.ops.ascend_plugin.weight_quant_matmul(**replaced(arguments))


def test_compiled_and_direct_calls_give_the_same(implementation: str) -> None:
    call = draw(Linear(bias="same", zeros=True))
    p = call.packed
    direct = weight_quant_matmul(call.x, p, call.bias)
    dispatched = torch.ops.ascend_plugin.weight_quant_matmul(
        call.x, p.weight, p.scales, p.zeros, call.bias, p.n, p.group, p.bits
    )
    assert torch.equal(direct, dispatched)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_opcheck(implementation: str, dtype: torch.dtype) -> None:
    call = draw(Linear(dtype=dtype, zeros=True, bias="float32"))
    p = call.packed
    torch.library.opcheck(
        torch.ops.ascend_plugin.weight_quant_matmul.default,
        (call.x, p.weight, p.scales, p.zeros, call.bias, p.n, p.group, p.bits),
    )
