"""Elementwise operators against torch on the CPU, through torch_npu's dispatch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from sim_parity import launches, parity

SHAPES = [(), (1,), (7,), (3, 5), (2, 3, 17), (0, 4)]
FLOATS = [torch.float32, torch.bfloat16, torch.float16]


def _positive(shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return (torch.rand(shape, generator=generator) * 0.9 + 0.05).to(dtype)


def _normal(shape: tuple[int, ...], dtype: torch.dtype = torch.float32, seed: int = 2) -> Any:
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(shape, generator=generator) * 3).to(dtype)


def _integers(shape: tuple[int, ...], dtype: torch.dtype = torch.int64, low: int = 1) -> Any:
    generator = torch.Generator().manual_seed(3)
    return torch.randint(low, 9, shape, generator=generator).to(dtype)


UNARY = [
    *("abs", "acos", "asin", "atan", "ceil", "cos", "cosh", "erf", "erfc", "exp", "exp2"),
    *("expm1", "floor", "frac", "isfinite", "isneginf", "isposinf", "log", "log10", "log1p"),
    *("log2", "logical_not", "neg", "reciprocal", "relu", "round", "rsqrt", "sigmoid", "sign"),
    *("signbit", "sin", "sinc", "sinh", "sqrt", "tan", "tanh", "trunc", "atanh", "asinh", "erfinv"),
]

#: Operators whose name is not the function's with a capital letter.
NAMES = {"isfinite": "IsFinite", "isneginf": "IsNegInf", "isposinf": "IsPosInf"}
NAMES |= {"logical_not": "LogicalNot", "bitwise_not": "BitwiseNot"}


@pytest.mark.parametrize("name", UNARY)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_unary(name: str, dtype: torch.dtype) -> None:
    function = getattr(torch, name)
    operator = NAMES.get(name, name.capitalize())
    for shape in SHAPES:
        parity(function, _positive(shape, dtype), operator=operator if 0 not in shape else ())


@pytest.mark.parametrize(
    "name",
    [
        *("exp", "log", "sqrt", "rsqrt", "reciprocal", "sigmoid", "tanh", "cos", "sin", "floor"),
        *("ceil", "relu", "erf", "exp2", "log2", "log10", "log1p", "expm1", "frac", "tan"),
        *("acos", "asin", "asinh", "atan", "atanh", "cosh", "sinh", "erfc", "erfinv", "sinc"),
    ],
)
def test_unary_in_place(name: str) -> None:
    function = getattr(torch.Tensor, name + "_")
    parity(function, _positive((3, 5)), operator="Inplace" + name.capitalize())
    parity(function, _positive((5, 3)).t())


def test_unary_on_integers() -> None:
    parity(torch.bitwise_not, _integers((3, 5)), operator="BitwiseNot")
    parity(torch.bitwise_not, _integers((3, 5)) > 4)
    parity(torch.neg, _integers((3, 5), torch.int32), operator="Neg")
    parity(torch.abs, -_integers((3, 5), torch.int16), operator="Abs")
    parity(torch.logical_not, _integers((3, 5), low=0), operator="LogicalNot")


F = torch.nn.functional


@pytest.mark.parametrize(
    ("function", "operator"),
    [
        (F.silu, "Silu"),
        (F.gelu, "Gelu"),
        (lambda x: F.gelu(x, approximate="tanh"), "Gelu"),
        (F.mish, "Mish"),
        (F.hardswish, "Hardswish"),
        (F.hardsigmoid, "Hardsigmoid"),
        (F.softplus, "Softplus"),
        (lambda x: F.leaky_relu(x, 0.2), "LeakyRelu"),
        (lambda x: F.threshold(x, 0.5, -1.0), "Threshold"),
    ],
)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_activation(function: Callable[..., Any], operator: str, dtype: torch.dtype) -> None:
    # aclnnGelu has one form for both approximations.
    tolerance = 1e-3 if operator == "Gelu" and dtype != torch.bfloat16 else None
    parity(function, _normal((3, 17), dtype), operator=operator, tolerance=tolerance)


BINARY = {
    "add": ("Add", "Adds"),
    "sub": ("Sub", "Subs"),
    "mul": ("Mul", "Muls"),
    "div": ("Div", "Divs"),
    "floor_divide": ("FloorDivide", "FloorDivides"),
    "remainder": ("RemainderTensorTensor", "RemainderTensorScalar"),
    "fmod": ("FmodTensor", "FmodScalar"),
    "pow": ("PowTensorTensor", "PowTensorScalar"),
    "eq": ("EqTensor", "EqScalar"),
    "ne": ("NeTensor", "NeScalar"),
    "lt": ("LtTensor", "LtScalar"),
    "le": ("LeTensor", "LeScalar"),
    "gt": ("GtTensor", "GtScalar"),
    "ge": ("GeTensor", "GeScalar"),
}


@pytest.mark.parametrize("name", BINARY)
@pytest.mark.parametrize("dtype", [*FLOATS, torch.int64, torch.int32], ids=str)
def test_binary(name: str, dtype: torch.dtype) -> None:
    function = getattr(torch, name)
    make = _positive if dtype.is_floating_point else _integers
    with_tensor, with_scalar = BINARY[name]
    for left, right in [((3, 5), (3, 5)), ((2, 3, 5), (3, 1)), ((5,), (4, 5)), ((), ())]:
        parity(function, make(left, dtype), make(right, dtype) + 1)
    parity(function, make((3, 5), dtype), make((3, 5), dtype) + 1, operator=with_tensor)
    parity(function, make((5, 3), dtype).t(), 2, operator=with_scalar)
    if dtype.is_floating_point:
        parity(function, make((5, 3), dtype), 0.75, operator=with_scalar)


@pytest.mark.parametrize("name", BINARY)
def test_binary_in_place(name: str) -> None:
    function = getattr(torch.Tensor, name + "_")
    with_tensor, with_scalar = BINARY[name]
    left, right = _positive((3, 5)), _positive((3, 5)) + 1
    parity(function, left, right, operator="Inplace" + with_tensor)
    parity(function, left, 2.0, operator="Inplace" + with_scalar)
    parity(function, _positive((5, 3)).t(), right[:, :1])


def test_activations_in_place() -> None:
    x = _normal((3, 17))
    parity(F.hardsigmoid, x, True, operator="InplaceHardsigmoid")
    parity(F.hardswish, x, True, operator="InplaceHardswish")
    parity(F.leaky_relu, x, 0.2, True, operator="InplaceLeakyRelu")
    parity(F.mish, x, True, operator="InplaceMish")
    parity(F.threshold, x, 0.5, -1.0, True, operator="InplaceThreshold")
    parity(lambda t: torch.acosh(t.abs() + 1), x, operator="Acosh")
    parity(lambda t: t.abs().add_(1).acosh_(), x, operator="InplaceAcosh")


def test_gelu_of_torch_npu() -> None:
    import torch_npu

    def function(x: torch.Tensor) -> Any:
        if x.device.type == "cpu":
            return F.gelu(x), F.gelu(x, approximate="tanh"), x * torch.sigmoid(1.702 * x)
        return (
            torch_npu.npu_gelu(x, approximate="none"),
            torch_npu.npu_gelu(x, approximate="tanh"),
            torch_npu.fast_gelu(x),
        )

    parity(function, _normal((3, 17)), operator=("GeluV2", "FastGelu"))


def test_scaled_addition() -> None:
    a, b = _normal((4, 3)), _normal((3,), seed=5)
    parity(lambda x, y: torch.add(x, y, alpha=0.3), a, b, operator="Add")
    parity(lambda x, y: torch.sub(x, y, alpha=2), a, b, operator="Sub")
    parity(lambda x, y: torch.rsub(x, y, alpha=2), a, b, operator="Rsub")
    parity(lambda x: 1.5 - x, a, operator="Rsubs")
    parity(lambda x: x.add_(2.5, alpha=2), a, operator="InplaceAdds")
    parity(lambda x: x.sub_(2.5), a, operator="InplaceSubs")


@pytest.mark.parametrize("mode", ["trunc", "floor"])
def test_division_with_rounding(mode: str) -> None:
    a, b = _normal((3, 5)), _normal((3, 5), seed=7)
    parity(lambda x, y: torch.div(x, y, rounding_mode=mode), a, b, operator="DivMod")
    parity(lambda x: torch.div(x, 0.7, rounding_mode=mode), a, operator="DivMods")
    parity(lambda x: torch.div(x, -3, rounding_mode=mode), _integers((3, 5)), operator="DivMods")
    parity(lambda x: x.div_(0.7, rounding_mode=mode), a, operator="InplaceDivMods")
    parity(lambda x, y: x.div_(y, rounding_mode=mode), a, b, operator="InplaceDivMod")
    parity(lambda x: x.floor_divide_(3), _integers((3,)), operator="InplaceFloorDivides")


def test_scalar_on_the_left() -> None:
    parity(lambda x: 2.0**x, _normal((3, 5)), operator="PowScalarTensor")
    parity(lambda x: torch.remainder(7, x), _integers((3, 5)), operator="RemainderScalarTensor")


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.bool], ids=str)
def test_bits(dtype: torch.dtype) -> None:
    a, b = _integers((3, 5), low=0), _integers((5,), low=0)
    a, b = (a > 4, b > 4) if dtype == torch.bool else (a.to(dtype), b.to(dtype))
    for name in ("And", "Or", "Xor"):
        function = getattr(torch, f"bitwise_{name.lower()}")
        parity(function, a, b, operator=f"Bitwise{name}Tensor")
        parity(function, a, True if dtype == torch.bool else 6, operator=f"Bitwise{name}Scalar")
    if dtype != torch.bool:
        parity(lambda x: x.__iand__(6), a, operator="InplaceBitwiseAndScalar")
        parity(lambda x, y: x.__iand__(y), a, b, operator="InplaceBitwiseAndTensor")
        parity(lambda x: x.__ixor__(6), a, operator="InplaceBitwiseXorScalar")
        parity(lambda x, y: x.__ixor__(y), a, b, operator="InplaceBitwiseXorTensor")
        parity(lambda x: x << 2, a)
        parity(torch.bitwise_left_shift, a, b)
        parity(torch.bitwise_right_shift, a, b)


def test_logic() -> None:
    a, b = _integers((3, 5), low=0) > 3, _integers((5,), low=0) > 5
    parity(torch.logical_and, a, b, operator="LogicalAnd")
    parity(torch.logical_or, a, b, operator="LogicalOr")
    parity(torch.logical_xor, a, b, operator="LogicalXor")
    parity(torch.logical_and, a.float(), b)
    parity(lambda x, y: x.logical_and_(y), a, b, operator="InplaceLogicalAnd")
    parity(lambda x, y: x.logical_or_(y), a, b, operator="InplaceLogicalOr")
    parity(lambda x: x.logical_not_(), a, operator="InplaceLogicalNot")


@pytest.mark.parametrize("dtype", [*FLOATS, torch.int64], ids=str)
def test_clamp(dtype: torch.dtype) -> None:
    x = _normal((3, 5), dtype)
    low, high = torch.tensor(-1, dtype=dtype), torch.full((5,), 2, dtype=dtype)
    parity(lambda t: t.clamp(-1, 2), x, operator="Clamp")
    parity(lambda t: t.clamp(min=-1), x)
    parity(lambda t: torch.clamp_min(t, -1), x, operator="ClampMin")
    parity(lambda t: torch.clamp_max(t, 2), x, operator="ClampMax")
    parity(lambda t, a, b: t.clamp(a, b), x, low, high, operator="ClampTensor")
    parity(torch.clamp_min, x, low, operator="ClampMinTensor")
    parity(torch.clamp_max, x, high, operator="ClampMaxTensor")
    parity(torch.maximum, x, high.expand(3, 5).contiguous(), operator="Maximum")
    parity(torch.minimum, x, high, operator="Minimum")
    parity(lambda t: t.clamp_(-1, 2), x)
    parity(lambda t: t.clamp_max_(2), x, operator="InplaceClampMax")
    parity(lambda t, a: t.clamp_min_(a), x, low, operator="InplaceClampMinTensor")
    parity(lambda t, a: t.clamp_max_(a), x, high, operator="InplaceClampMaxTensor")


def test_selection() -> None:
    a, b = _normal((3, 5)), _normal((5,), seed=6)
    mask = a > 0
    parity(torch.where, mask, a, b, operator="SWhere")
    parity(lambda m, x: torch.where(m, x, 0.5), mask, a)
    parity(lambda x, m: x.masked_fill_(m, -torch.inf), a, mask, operator="InplaceMaskedFillScalar")
    parity(lambda x, m: x.masked_fill_(m[:1], 2.0), _integers((3, 5)), mask)
    fill = torch.tensor(3.0)
    parity(lambda x, m, v: x.masked_fill_(m, v), a, mask, fill, operator="InplaceMaskedFillTensor")


@pytest.mark.parametrize("dtype", [*FLOATS, torch.int64, torch.int8, torch.bool], ids=str)
def test_filling(dtype: torch.dtype) -> None:
    x = _integers((4, 6), low=0).to(dtype)
    parity(lambda t: t.fill_(1), x, operator="InplaceFillScalar")
    parity(lambda t: t[1:3, ::2].fill_(1), x)
    parity(lambda t: t.zero_(), x, operator="InplaceZero")
    parity(lambda t: torch.ones(t.shape, dtype=t.dtype, device=t.device), x, operator="InplaceOne")
    parity(torch.ones_like, x)
    parity(torch.zeros_like, x)
    parity(lambda t: t.fill_(t[0, 0]), x)
    if dtype != torch.bool:
        parity(lambda t: t.fill_diagonal_(3), x, operator="InplaceFillDiagonal")


@pytest.mark.parametrize("source", [*FLOATS, torch.int64, torch.int32, torch.bool], ids=str)
@pytest.mark.parametrize("target", [*FLOATS, torch.int64, torch.int8, torch.bool], ids=str)
def test_casting(source: torch.dtype, target: torch.dtype) -> None:
    x = _integers((3, 5), low=0).to(source)
    parity(lambda t: t.to(target), x)
    parity(lambda t: t.t().to(target), x)


def test_copying() -> None:
    x, y = _normal((4, 6)), _normal((6, 4), seed=8)
    parity(lambda a, b: a.copy_(b.t()), x, y, operator="InplaceCopy")
    parity(lambda a, b: a[1:3].copy_(b.t()[0]), x, y)
    parity(lambda a: a[:, ::2].contiguous(), x)
    parity(lambda a: a.t().contiguous(), x)
    parity(lambda a: a.permute(2, 0, 1).contiguous(), _normal((2, 3, 4)))
    parity(lambda a: a.expand(5, 4, 6).clone(), x)
    targets = [torch.zeros_like(x).npu() for _ in range(2)]
    torch._foreach_copy_(targets, [x.npu(), x.npu() + 1])
    found = [each.cpu() for each in targets]
    assert torch.equal(found[0], x)
    assert torch.equal(found[1], x + 1)
    assert launches()["aclnnForeachCopy"]


def test_triangles_and_interpolation() -> None:
    x, y = _normal((5, 7)), _normal((5, 7), seed=9)
    parity(lambda t: torch.triu(t, 1), x, operator="Triu")
    parity(lambda t: torch.tril(t, -1), x, operator="Tril")
    parity(lambda t: t.triu_(1), x, operator="InplaceTriu")
    parity(lambda t: t.tril_(1), x, operator="InplaceTril")
    parity(lambda a, b: torch.lerp(a, b, 0.3), x, y, operator="Lerps")
    parity(torch.lerp, x, y, x.sigmoid(), operator="Lerp")
    parity(lambda a, b: torch.addcmul(a, b, b, value=0.5), x, y, operator="Addcmul")
    parity(lambda a, b: torch.addcdiv(a, b, b.abs() + 1, value=2), x, y, operator="Addcdiv")
    parity(torch.atan2, x, y, operator="Atan2")
    parity(lambda a, b: a.atan2_(b), x, y, operator="InplaceAtan2")
    parity(lambda a, b: a.lerp_(b, 0.3), x, y, operator="InplaceLerps")
    parity(lambda a, b: a.lerp_(b, b.sigmoid()), x, y, operator="InplaceLerp")
    parity(lambda a, b: a.addcmul_(b, b, value=0.5), x, y, operator="InplaceAddcmul")
    parity(lambda a, b: a.addcdiv_(b, b.abs() + 1), x, y, operator="InplaceAddcdiv")


def test_comparing_whole_tensors() -> None:
    x = _normal((3, 5))
    a, b = x.npu(), x.npu()
    assert torch.equal(a, b)
    assert not torch.equal(a, b + 1)
    parity(lambda t, u: torch.isclose(t, u), x, x + 1e-9, operator="IsClose")
    broken = torch.tensor([1.0, torch.nan, torch.inf, -torch.inf])
    parity(torch.nan_to_num, broken, operator="NanToNum")
    parity(lambda t: t.nan_to_num_(0.5), broken, operator="InplaceNanToNum")
    parity(torch.isnan, broken)
    parity(torch.isinf, broken)
