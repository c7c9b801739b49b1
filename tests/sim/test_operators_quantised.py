"""Quantisation to int8 and products of int8 matrices."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from sim_parity import assert_close, launches

SHORT = [torch.bfloat16, torch.float16]


def _normal(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(2)).to(dtype)


@pytest.mark.parametrize("dtype", SHORT, ids=str)
@pytest.mark.parametrize("shape", [(5, 64), (2, 3, 33)])
def test_dynamic_quant(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    import torch_npu

    x = _normal(*shape, dtype=dtype)
    x[0] = 0
    codes, scales = (each.cpu() for each in torch_npu.npu_dynamic_quant(x.npu()))
    assert codes.dtype == torch.int8
    assert scales.shape == shape[:-1]
    assert not codes[0].any()
    torch.testing.assert_close(scales, x.float().abs().amax(-1) / 127)
    error = (codes.float() * scales[..., None] - x.float()).abs()
    assert (error <= scales[..., None] * 0.501).all()
    assert launches()["aclnnDynamicQuant"] + launches()["aclnnDynamicQuantV2"]


def test_quantising_with_given_scales() -> None:
    import torch_npu

    x, scales = _normal(5, 64).float(), torch.rand(64) * 50
    codes = torch_npu.npu_quantize(x.npu(), scales.npu(), None, torch.qint8, -1, False).cpu()
    expected = (x.float() * scales).round().clamp(-128, 127).to(torch.int8)
    assert torch.equal(codes, expected)
    assert launches()["aclnnAscendQuantV3"]
    divided = torch_npu.npu_quantize(x.npu(), scales.npu() / 999, None, torch.qint8, -1, True)
    expected = (x.float() / (scales / 999)).round().clamp(-128, 127).to(torch.int8)
    assert (divided.cpu().int() - expected.int()).abs().max() <= 1


@pytest.mark.parametrize("tiled", [False, True])
@pytest.mark.parametrize("per_token", [False, True])
def test_int8_products(tiled: bool, per_token: bool) -> None:
    import torch_npu

    generator = torch.Generator().manual_seed(3)
    x = torch.randint(-127, 128, (5, 64), generator=generator).to(torch.int8)
    weight = torch.randint(-127, 128, (64, 96), generator=generator).to(torch.int8)
    scale = torch.rand(96, generator=generator).to(torch.bfloat16) * 1e-3
    token_scale = torch.rand(5, generator=generator) if per_token else None
    expected = (x.long() @ weight.long()).float() * scale.float()
    if token_scale is not None:
        expected = expected * token_scale[:, None]
    right = weight.npu()
    if tiled:
        torch.npu.config.allow_internal_format = True
        right = torch_npu.npu_format_cast(right, 29)
    result = torch_npu.npu_quant_matmul(
        *(x.npu(), right, scale.npu()),
        pertoken_scale=None if token_scale is None else token_scale.npu(),
        output_dtype=torch.bfloat16,
    )
    assert_close(result.cpu(), expected.bfloat16(), None)


def test_int8_products_with_biases() -> None:
    """Integers are added before scaling, floats after; an NZ weight is the same matrix."""
    import torch_npu

    generator = torch.Generator().manual_seed(4)
    x = torch.randint(-127, 128, (3, 64), generator=generator).to(torch.int8)
    weight = torch.randint(-127, 128, (64, 96), generator=generator).to(torch.int8)
    scale = torch.rand(96, generator=generator) * 1e-4
    whole = torch.randint(-5000, 5000, (96,), generator=generator, dtype=torch.int32)
    exact = x.long() @ weight.long()
    args = (x.npu(), weight.npu(), scale.npu())
    before = torch_npu.npu_quant_matmul(*args, bias=whole.npu(), output_dtype=torch.bfloat16)
    assert_close(before.cpu(), ((exact + whole).float() * scale).bfloat16(), None)
    added = torch.randn(96, generator=generator)
    tokens = torch.rand(3, generator=generator)
    after = torch_npu.npu_quant_matmul(
        *args, pertoken_scale=tokens.npu(), bias=added.npu(), output_dtype=torch.float16
    )
    assert_close(after.cpu(), (exact.float() * scale * tokens[:, None] + added).half(), None)


def _refused(match: str, function: Any, *args: Any, **kwargs: Any) -> None:
    with pytest.raises(RuntimeError, match=match) as error:
        function(*args, **kwargs)
    assert "[source: " in str(error.value)


def test_int8_products_that_are_refused() -> None:
    import torch_npu

    x, weight = torch.ones(3, 64, dtype=torch.int8).npu(), torch.ones(64, 32, dtype=torch.int8)
    scale = torch.ones(32)
    product = torch_npu.npu_quant_matmul
    args = (x, weight.npu(), scale.npu())
    bf16 = {"output_dtype": torch.bfloat16}
    _refused("bias is torch.float16", product, *args, bias=scale.half().npu(), **bf16)
    _refused(r"must be one per row of \(3, 64\)", product, *args, pertoken_scale=args[2], **bf16)
    wide = torch.ones(64, 65536, dtype=torch.int8).npu()
    _refused("must not exceed 65535", product, x, wide, torch.ones(65536).npu(), **bf16)
    with pytest.raises(RuntimeError, match="aclnnTransQuantParam"):
        product(*args, output_dtype=torch.float16)
    like_x = torch.ones(1, dtype=torch.bfloat16).npu()
    floats = torch.ones(3, 64, dtype=torch.bfloat16).npu()
    quantise = torch_npu.npu_quantize
    _refused(
        "zero_points .* must be like", quantise, floats, like_x, args[2], torch.qint8, -1, False
    )


@pytest.mark.parametrize("group", [0, 32])
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("transposed", [False, True])
def test_weight_only_products(bits: int, group: int, transposed: bool) -> None:
    """Codes plus offsets, times scales; 4-bit codes lie eight in an int32."""
    import torch_npu

    generator = torch.Generator().manual_seed(bits)
    low = -(1 << (bits - 1))
    codes = torch.randint(low, -low, (64, 96), generator=generator, dtype=torch.int32)
    groups = 64 // group if group else 1
    scale = (torch.rand(groups, 96, generator=generator) * 0.1).bfloat16()
    offset = torch.randint(-8, 8, (groups, 96), generator=generator).bfloat16()
    x, bias = _normal(5, 64), torch.randn(96, generator=generator)
    rows = codes.t().contiguous() if transposed else codes
    if bits == 4:
        packed = torch_npu.npu_convert_weight_to_int4pack(rows.npu())
        assert packed.shape == (rows.shape[0], rows.shape[1] // 8)
    else:
        packed = rows.to(torch.int8).npu()
    got = torch_npu.npu_weight_quant_batchmatmul(
        *(x.npu(), packed.t() if transposed else packed, scale.npu(), offset.npu()),
        bias=bias.npu(),
        antiquant_group_size=group,
    )
    spread = [each.float().repeat_interleave(64 // groups, 0) for each in (offset, scale)]
    weight = ((codes + spread[0]) * spread[1]).bfloat16()  # as the cube unit wants it
    expected = x.double() @ weight.double() + bias
    torch.testing.assert_close(got.cpu().double(), expected, atol=5e-2, rtol=1e-2)


def test_weight_only_products_that_are_refused() -> None:
    import torch_npu

    product = torch_npu.npu_weight_quant_batchmatmul
    x, scale = _normal(5, 64).npu(), torch.ones(96, dtype=torch.bfloat16).npu()
    weight = torch.ones(64, 96, dtype=torch.int8).npu()
    _refused("antiquant_scale is torch.float16", product, x, weight, scale.half())
    _refused("bias is torch.bfloat16", product, x, weight, scale, bias=scale)
    _refused("weight is torch.int16", product, x, weight.short(), scale)
    _refused(r"antiquant_scale \(96,\) for 64", product, x, weight, scale, antiquant_group_size=32)
    torch.npu.config.allow_internal_format = True
    _refused("NZ format", product, x, torch_npu.npu_format_cast(weight, 29), scale)
    with pytest.raises(RuntimeError, match="multiple of 32 within the range"):
        product(x, weight, scale, antiquant_group_size=48)
