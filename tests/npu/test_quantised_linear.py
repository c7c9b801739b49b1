"""The kernels of quantised layers on the NPU: made from unpacked weights, against float64."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from ascend_plugin.quantization.execute import LinearKernel, Operand, make_kernel
from ascend_plugin.quantization.plan import Kernel
from ascend_plugin.quantization.scheme import InputScheme
from ascend_plugin.quantization.unpack import Codes, StaticInput

N, K, ROWS = 96, 128, 7
INPUT_SCALE, ZERO = 0.0371, -19

#: One rounding of the result.
TOLERANCES = {torch.bfloat16: 2**-7, torch.float16: 2**-9}


def _operand(dtype: torch.dtype, device: torch.device, bias: bool = True) -> Operand:
    generator = torch.Generator().manual_seed(4)
    codes = torch.randint(-127, 128, (N, K), generator=generator, dtype=torch.int8)
    scales = torch.rand(N, 1, generator=generator) * 1e-3
    own = torch.randn(N, generator=generator).to(dtype) if bias else None
    return Operand(Codes(codes, scales), 8, K, None, None, None, own, dtype, device)


def _input(dtype: torch.dtype) -> torch.Tensor:
    return torch.randn(ROWS, K, generator=torch.Generator().manual_seed(5)).to(dtype)


def _assert_near(got: torch.Tensor, want: torch.Tensor) -> None:
    assert got.dtype in TOLERANCES
    tolerance = TOLERANCES[got.dtype]
    torch.testing.assert_close(got.cpu().double(), want, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("modelslim", [True, False])
def test_static_inputs(modelslim: bool, dtype: torch.dtype, device: torch.device) -> None:
    """Codes stand for what they are scaled with, although the factor has 16 bits."""
    operand = _operand(dtype, device, bias=not modelslim)
    codes, scales = operand.codes.codes, operand.codes.scales
    static = StaticInput(INPUT_SCALE, ZERO)
    x = _input(dtype)
    factor = torch.tensor(1 / INPUT_SCALE).to(dtype)
    quantised = (x.float() * factor.float() + ZERO).round().clamp(-128, 127).double() - ZERO
    want = (quantised / factor.double()) @ (codes.double() * scales.double()).T
    if modelslim:
        deq = INPUT_SCALE * scales.double()
        bias = torch.randn(N, generator=torch.Generator().manual_seed(6)).double()
        whole = (bias / deq.flatten()).round() - ZERO * codes.double().sum(1)
        operand = replace(
            operand,
            codes=Codes(codes, deq.float()),
            quant_bias=whole.to(torch.int32),
        )
        want = want + bias
    else:
        assert operand.bias is not None
        want = want + operand.bias.double()
    operand = replace(operand, static=static, input=InputScheme(dynamic=False, symmetric=False))
    kernel = make_kernel(Kernel.NPU_INT8_STATIC, operand)
    got = kernel(x.to(device), not modelslim)
    _assert_near(got, want)
    if dtype == torch.bfloat16:
        # By what all results would be off if the final scale did not make up for the factor.
        lost = abs(float(factor) * INPUT_SCALE - 1)
        gain = float((got.cpu().double() * want).sum() / want.square().sum())
        assert abs(gain - 1) < lost / 4


def test_factors_that_float16_cannot_hold(device: torch.device) -> None:
    operand = replace(_operand(torch.float16, device), static=StaticInput(1e-6, 0))
    with pytest.raises(ValueError, match=r"input_scale 1e-06 is too small for torch.float16"):
        make_kernel(Kernel.NPU_INT8_STATIC, operand)


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
def test_dynamic_inputs(dtype: torch.dtype, device: torch.device) -> None:
    operand = _operand(dtype, device)
    assert operand.bias is not None
    x = _input(dtype)
    scale = x.float().abs().amax(-1, keepdim=True) / 127
    quantised = (x.float() / scale).round().double() * scale.double()
    want = quantised @ (operand.codes.codes.double() * operand.codes.scales.double()).T
    got = make_kernel(Kernel.NPU_INT8_DYNAMIC, operand)(x.to(device), True)
    _assert_near(got, want + operand.bias.double())


@pytest.mark.parametrize("kernel", [Kernel.NPU_INT8_DYNAMIC, Kernel.NPU_WEIGHT_ONLY])
def test_columns_beyond_an_operators_limit(
    kernel: Kernel, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They are multiplied in parts, to the same bits."""
    from ascend_plugin.quantization import execute_npu

    def run() -> tuple[LinearKernel, torch.Tensor]:
        made = make_kernel(kernel, _operand(torch.bfloat16, device))
        return made, made(_input(torch.bfloat16).to(device), True).cpu()

    _, want = run()
    monkeypatch.setattr(execute_npu, "_MOST_COLUMNS", 64)
    made, got = run()
    assert len(next(made.children())) == 2
    assert torch.equal(got, want)


def test_float_parts(device: torch.device) -> None:
    from ascend_plugin.quantization.execute import make_float_kernel

    weight = torch.randn(N, K, generator=torch.Generator().manual_seed(7)).bfloat16() * K**-0.5
    bias, x = torch.ones(N, dtype=torch.bfloat16), _input(torch.bfloat16)
    kernel = make_float_kernel(weight, bias, device)
    _assert_near(kernel(x.to(device), True), x.double() @ weight.double().T + 1)
    _assert_near(kernel(x.to(device), False), x.double() @ weight.double().T)
