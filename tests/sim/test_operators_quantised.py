"""Quantisation to int8 and products of int8 matrices."""

from __future__ import annotations

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
