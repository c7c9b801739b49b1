"""Operators on integer weights on the NPU, against their references on the CPU."""

from __future__ import annotations

import pytest
import torch

from ascend_plugin.ops.dispatch import UnsupportedRequestError
from ascend_plugin.ops.dynamic_quant import dynamic_quant
from ascend_plugin.ops.dynamic_quant.reference import quantise
from ascend_plugin.ops.hadamard import hadamard
from ascend_plugin.ops.hadamard.reference import hadamard as hadamard_reference
from ascend_plugin.ops.packed_weight import PackedWeight
from ascend_plugin.ops.quant_matmul import quant_matmul
from ascend_plugin.ops.static_quant import static_quant
from ascend_plugin.ops.static_quant.reference import quantise as static_reference
from ascend_plugin.ops.weight_quant_matmul import weight_quant_matmul

DTYPES = (torch.bfloat16, torch.float16)


def _generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _codes(n: int, k: int, bits: int = 8) -> torch.Tensor:
    low = -(1 << (bits - 1))
    return torch.randint(low, -low, (n, k), generator=_generator(n * k), dtype=torch.int8)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("per_token", [False, True])
@pytest.mark.parametrize("shape", [(96, 64), (40, 72)], ids=str)
@pytest.mark.parametrize("rows", [0, 1, 7])
def test_int8_products(
    rows: int, shape: tuple[int, int], per_token: bool, dtype: torch.dtype, device: torch.device
) -> None:
    """Exact in integers; weights in NZ order where they are whole fractals."""
    import torch_npu

    from ascend_plugin.ops.npu import linear, quantised_linear

    (n, k), generator = shape, _generator(rows)
    codes, x = _codes(n, k), _codes(rows, k) if rows else torch.empty(0, k, dtype=torch.int8)
    scale = torch.rand(n, generator=generator) * 1e-4
    row_scale = torch.rand(rows, generator=generator) if per_token else None
    whole = torch.randint(-9999, 9999, (n,), generator=generator, dtype=torch.int32)
    bias = torch.randn(n, generator=generator)
    packed = quantised_linear.pack_int8(codes, device)
    in_nz = torch_npu.get_npu_format(packed.weight) == linear.FORMAT_NZ
    assert in_nz == (shape == (96, 64))
    assert torch.equal(packed.weight.cpu(), codes.t())
    got = quant_matmul(
        x.to(device),
        packed,
        scale.to(device),
        None if row_scale is None else row_scale.to(device),
        quant_bias=whole.to(device),
        bias=bias.to(device),
        out_dtype=dtype,
    )
    exact = (x.long() @ codes.long().T + whole).float()
    factor = scale if row_scale is None else row_scale[:, None] * scale
    assert got.dtype == dtype
    torch.testing.assert_close(got.cpu().float(), exact * factor + bias, atol=2e-2, rtol=1e-2)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_int8_products_take_one_scale_and_biases_of_any_type(
    dtype: torch.dtype, device: torch.device
) -> None:
    from ascend_plugin.ops.npu import quantised_linear

    codes, x = _codes(32, 64), _codes(5, 64)
    packed = quantised_linear.pack_int8(codes, device)
    scale, one = torch.full((32,), 1e-3), torch.tensor([0.5])
    bias = torch.randn(32, generator=_generator(1)).to(dtype)
    got = quant_matmul(
        *(x.to(device), packed, scale.to(device), one.to(device)),
        bias=bias.to(device),
        out_dtype=dtype,
    )
    want = (x.long() @ codes.long().T).float() * 5e-4 + bias.float()
    torch.testing.assert_close(got.cpu().float(), want, atol=1e-2, rtol=1e-2)


def _weight(
    n: int, k: int, bits: int, group: int, zeros: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    generator = _generator(bits + group)
    scales = torch.rand(n, k // group, generator=generator) * 0.1
    points = torch.randint(-8, 8, scales.shape, generator=generator, dtype=torch.int8)
    return _codes(n, k, bits), scales, points if zeros else None


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("zeros", [False, True])
@pytest.mark.parametrize("group", [32, 64, 128, 256])
@pytest.mark.parametrize("bits", [4, 8])
def test_weight_only_products(
    bits: int, group: int, zeros: bool, dtype: torch.dtype, device: torch.device
) -> None:
    from ascend_plugin.ops.npu import quantised_linear

    codes, scales, points = _weight(40, 256, bits, group, zeros)
    packed = quantised_linear.pack_weight(
        codes, scales, points, bits=bits, group=group, dtype=dtype, device=device
    )
    x = torch.randn(5, 256, generator=_generator(3)).to(dtype)
    bias = torch.randn(40, generator=_generator(4)).to(dtype)
    wide = codes.float()
    if points is not None:
        wide = wide - points.float().repeat_interleave(group, 1)
    weight = (wide * scales.to(dtype).float().repeat_interleave(group, 1)).to(dtype).double()
    want = x.double() @ weight.T
    got = weight_quant_matmul(x.to(device), packed)
    torch.testing.assert_close(got.cpu().double(), want, atol=5e-2, rtol=1e-2)
    got = weight_quant_matmul(x.to(device), packed, bias.to(device))
    torch.testing.assert_close(got.cpu().double(), want + bias.double(), atol=5e-2, rtol=1e-2)
    assert weight_quant_matmul(x[:0].to(device), packed).shape == (0, 40)
    # An eighth or half of 16 bits, and scales: no second copy.
    assert packed.weight.nbytes == 40 * 256 * bits // 8


def test_words_are_those_of_the_operator(device: torch.device) -> None:
    import torch_npu

    from ascend_plugin.ops.npu import quantised_linear

    codes = _codes(24, 64, 4)
    theirs = torch_npu.npu_convert_weight_to_int4pack(codes.int().to(device))
    assert torch.equal(quantised_linear.pack_words(codes), theirs.cpu())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rows", [0, 1, 7])
def test_dynamic_quant(rows: int, dtype: torch.dtype, device: torch.device) -> None:
    x = torch.randn(rows, 72, generator=_generator(5)).to(dtype)
    got, want = dynamic_quant(x.to(device)), quantise(x, True)
    assert got.zeros is None
    torch.testing.assert_close(got.scales.cpu(), want.scales)
    assert int((got.codes.cpu().int() - want.codes.int()).abs().max() if rows else 0) <= 1


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("zero", [0, -19])
def test_static_quant(zero: int, dtype: torch.dtype, device: torch.device) -> None:
    """Products and rounding in float32; ends of the range; no rows."""
    x = torch.randn(5, 64, generator=_generator(6)).to(dtype)
    x[0, :2] = torch.tensor([1e4, -1e4])
    factor = torch.tensor([30.0], dtype=dtype)
    point = torch.tensor([zero], dtype=dtype)
    got = static_quant(x.to(device), factor.to(device), point.to(device)).cpu()
    assert torch.equal(got, static_reference(x, factor, point))
    assert got[0, :2].tolist() == [127, -128]
    assert static_quant(x[:0].to(device), factor.to(device), point.to(device)).shape == (0, 64)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("d", "block"), [(64, 64), (128, 32), (96, 12), (2048, 2048), (1536, 1536)]
)
def test_hadamard(d: int, block: int, dtype: torch.dtype, device: torch.device) -> None:
    from ascend_plugin.ops.hadamard.matrices import base_for

    x = torch.randn(3, d, generator=_generator(7)).to(dtype)
    want = torch.empty(3, d, dtype=torch.float64)
    hadamard_reference(x, base_for(block), want, block, block**-0.5, compute_dtype=torch.float64)
    got = hadamard(x.to(device), block)
    assert got.dtype == dtype
    torch.testing.assert_close(got.cpu().double(), want, atol=3e-2, rtol=1e-2)
    # Symmetric or not: rotating is exact on unit vectors, up to the factor's rounding.
    unit = torch.zeros(1, d, dtype=dtype)
    unit[0, 1] = 1
    rotated = hadamard(unit.to(device), block, normalise=False).cpu()
    assert set(rotated.unique().tolist()) <= {-1.0, 0.0, 1.0}


def test_what_operators_refuse(device: torch.device) -> None:
    from ascend_plugin.ops.npu import quantised_linear

    x = torch.ones(3, 64, dtype=torch.int8, device=device)
    packed = quantised_linear.pack_int8(_codes(32, 64), device)
    scale, zero = torch.ones(32, device=device), torch.ones(3, dtype=torch.int32, device=device)
    with pytest.raises(UnsupportedRequestError, match="knows no zero points of rows"):
        quant_matmul(x, packed, scale, x_zero=zero)
    with pytest.raises(UnsupportedRequestError, match="float32: an NPU computes in torch"):
        quant_matmul(x, packed, scale, out_dtype=torch.float32)
    with pytest.raises(ValueError, match=r"weight must be int8 \[64, 16\]"):
        quant_matmul(x, packed, scale[:16])
    floats = torch.ones(3, 64, dtype=torch.bfloat16, device=device)
    with pytest.raises(UnsupportedRequestError, match="not whole numbers in the NPU's operator"):
        dynamic_quant(floats, symmetric=False)
    with pytest.raises(UnsupportedRequestError, match=r"npu_quantize wants the input's type"):
        static_quant(floats, scale[:1], scale[:1])
    with pytest.raises(UnsupportedRequestError, match="take matrices beyond 1024"):
        hadamard(torch.ones(1, 1 << 21, dtype=torch.bfloat16, device=device))


def test_what_weights_are_refused(device: torch.device) -> None:
    from ascend_plugin.ops.npu import quantised_linear

    def pack(
        n: int, k: int, bits: int, group: int, dtype: torch.dtype = torch.bfloat16
    ) -> PackedWeight:
        codes, scales, _ = _weight(n, k, bits, group, False)
        return quantised_linear.pack_weight(
            codes, scales, None, bits=bits, group=group, dtype=dtype, device=device
        )

    with pytest.raises(UnsupportedRequestError, match="12 output features of 4-bit codes"):
        pack(12, 64, 4, 32)
    with pytest.raises(UnsupportedRequestError, match="36 input features of 4-bit codes"):
        pack(16, 36, 4, 36)
    with pytest.raises(UnsupportedRequestError, match="at most 65535 are allowed"):
        pack(65544, 8, 8, 8)
    with pytest.raises(UnsupportedRequestError, match="an NPU computes in"):
        pack(16, 64, 4, 32, torch.float32)
    with pytest.raises(ValueError, match="does not cut k=96 into equal parts"):
        pack(16, 96, 4, 64)
    x = torch.ones(3, 64, dtype=torch.float16, device=device)
    with pytest.raises(ValueError, match=r"scales must be torch.float16 \[2, 16\]"):
        weight_quant_matmul(x, pack(16, 64, 4, 32))
