"""Elementwise operators: copies and fills, unary and binary functions, comparisons, selection.

Families come from tables of names. The last argument of an out-of-place operator is the tensor for
its result; ``aclnnInplace…`` write their first argument.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from ..table import operator, write

Function = Callable[..., torch.Tensor]

_UNARY: dict[str, Function] = {
    "Abs": torch.abs,
    "Acos": torch.acos,
    "Acosh": torch.acosh,
    "Asin": torch.asin,
    "Asinh": torch.asinh,
    "Atan": torch.atan,
    "Atanh": torch.atanh,
    "BitwiseNot": torch.bitwise_not,
    "Ceil": torch.ceil,
    "Cos": torch.cos,
    "Cosh": torch.cosh,
    "Erf": torch.erf,
    "Erfc": torch.erfc,
    "Erfinv": torch.erfinv,
    "Exp": torch.exp,
    "Exp2": torch.exp2,
    "Expm1": torch.expm1,
    "Floor": torch.floor,
    "Frac": torch.frac,
    "Gelu": torch.nn.functional.gelu,
    "Hardsigmoid": torch.nn.functional.hardsigmoid,
    "Hardswish": torch.nn.functional.hardswish,
    "IsFinite": torch.isfinite,
    "IsNegInf": torch.isneginf,
    "IsPosInf": torch.isposinf,
    "Log": torch.log,
    "Log10": torch.log10,
    "Log1p": torch.log1p,
    "Log2": torch.log2,
    "LogicalNot": torch.logical_not,
    "Mish": torch.nn.functional.mish,
    "Neg": torch.neg,
    "Reciprocal": torch.reciprocal,
    "Relu": torch.relu,
    "Round": torch.round,
    "Rsqrt": torch.rsqrt,
    "Sigmoid": torch.sigmoid,
    "Sign": torch.sign,
    "Signbit": torch.signbit,
    "Silu": torch.nn.functional.silu,
    "Sin": torch.sin,
    "Sinc": torch.sinc,
    "Sinh": torch.sinh,
    "Sqrt": torch.sqrt,
    "Tan": torch.tan,
    "Tanh": torch.tanh,
    "Trunc": torch.trunc,
}

#: Functions without an in-place operator.
_OUT_OF_PLACE = (
    *(
        "Abs",
        "BitwiseNot",
        "BitwiseOrScalar",
        "BitwiseOrTensor",
        "Clamp",
        "ClampMin",
        "ClampTensor",
    ),
    *("FastGelu", "Gelu", "GeluV2", "IsFinite", "IsNegInf", "IsPosInf", "LeftShift", "LeftShifts"),
    *("LogicalXor", "Maximum", "Minimum", "Neg", "RightShift", "Round", "Rsub", "Rsubs", "SWhere"),
    *("Sign", "Signbit", "Silu", "Softplus", "Trunc"),
)

#: Two tensors.
_BINARY: dict[str, Function] = {
    "Atan2": torch.atan2,
    "BitwiseAndTensor": torch.bitwise_and,
    "BitwiseOrTensor": torch.bitwise_or,
    "BitwiseXorTensor": torch.bitwise_xor,
    "Div": torch.div,
    "EqTensor": torch.eq,
    "FloorDivide": torch.floor_divide,
    "FmodTensor": torch.fmod,
    "GeTensor": torch.ge,
    "GtTensor": torch.gt,
    "LeTensor": torch.le,
    "LeftShift": torch.bitwise_left_shift,
    "LogicalAnd": torch.logical_and,
    "LogicalOr": torch.logical_or,
    "LogicalXor": torch.logical_xor,
    "LtTensor": torch.lt,
    "Maximum": torch.maximum,
    "Minimum": torch.minimum,
    "Mul": torch.mul,
    "NeTensor": torch.ne,
    "PowTensorTensor": torch.pow,
    "RemainderTensorTensor": torch.remainder,
    "RightShift": torch.bitwise_right_shift,
}

#: A tensor and a scalar.
_BINARY_SCALAR: dict[str, Function] = {
    "BitwiseAndScalar": torch.bitwise_and,
    "BitwiseOrScalar": torch.bitwise_or,
    "BitwiseXorScalar": torch.bitwise_xor,
    "Divs": torch.div,
    "EqScalar": torch.eq,
    "FloorDivides": torch.floor_divide,
    "FmodScalar": torch.fmod,
    "GeScalar": torch.ge,
    "GtScalar": torch.gt,
    "LeScalar": torch.le,
    "LeftShifts": torch.bitwise_left_shift,
    "LtScalar": torch.lt,
    "Muls": torch.mul,
    "NeScalar": torch.ne,
    "PowTensorScalar": torch.pow,
    "RemainderTensorScalar": torch.remainder,
}

#: A tensor, a tensor or scalar, and ``alpha``.
_SCALED: dict[str, Function] = {"Add": torch.add, "Sub": torch.sub, "Rsub": torch.rsub}

#: Rounding of aclnnDivMod (``op_api::div`` with a rounding mode).
_ROUNDING = {0: None, 1: "trunc", 2: "floor"}


def _family(name: str, signature: str, function: Function) -> None:
    """Register ``aclnnName``, and ``aclnnInplaceName`` if it exists, of a function."""

    def into_output(*args: Any) -> None:
        write(args[-1], function(*args[:-1]))

    def in_place(target: torch.Tensor, *args: Any) -> None:
        write(target, function(target, *args))

    operator(f"aclnn{name}", signature + "T")(into_output)
    if signature.startswith("T") and name not in _OUT_OF_PLACE:
        operator(f"aclnnInplace{name}", signature)(in_place)


def _scaled(function: Function) -> Function:
    return lambda left, right, alpha: function(left, right, alpha=alpha)


def _divide(left: torch.Tensor, right: Any, mode: int) -> torch.Tensor:
    return torch.div(left, right, rounding_mode=_ROUNDING[mode])


def _nan_to_num(tensor: torch.Tensor, nan: float, positive: float, negative: float) -> torch.Tensor:
    return torch.nan_to_num(tensor, nan, positive, negative)


def _softplus(tensor: torch.Tensor, beta: float, threshold: float) -> torch.Tensor:
    return torch.nn.functional.softplus(tensor, beta, threshold)


def _gelu(tensor: torch.Tensor, mode: int) -> torch.Tensor:
    return torch.nn.functional.gelu(tensor, approximate="tanh" if mode else "none")


def _register() -> None:
    for name, function in _UNARY.items():
        _family(name, "T", function)
    for name, function in _BINARY.items():
        _family(name, "TT", function)
    for name, function in _BINARY_SCALAR.items():
        _family(name, "TS", function)
    for name, function in _SCALED.items():
        _family(name, "TTS", _scaled(function))
        _family(f"{name}s", "TSS", _scaled(function))
    _family("DivMod", "TTe", _divide)
    _family("DivMods", "TSe", _divide)
    _family("PowScalarTensor", "ST", torch.pow)
    _family("RemainderScalarTensor", "ST", torch.remainder)
    _family("Clamp", "TSS", torch.clamp)
    _family("ClampMin", "TS", torch.clamp_min)
    _family("ClampMax", "TS", torch.clamp_max)
    _family("ClampTensor", "TTT", torch.clamp)
    _family("ClampMinTensor", "TT", torch.clamp_min)
    _family("ClampMaxTensor", "TT", torch.clamp_max)
    _family("NanToNum", "Tfff", _nan_to_num)
    _family("Softplus", "TSS", _softplus)
    _family("LeakyRelu", "TS", torch.nn.functional.leaky_relu)
    _family("Threshold", "TSS", torch.threshold)
    _family("GeluV2", "Ti", _gelu)
    _family("Lerp", "TTT", torch.lerp)
    _family("Lerps", "TTS", torch.lerp)
    _family("Addcmul", "TTTS", lambda a, b, c, value: torch.addcmul(a, b, c, value=value))
    _family("Addcdiv", "TTTS", lambda a, b, c, value: torch.addcdiv(a, b, c, value=value))
    _family("Triu", "Ti", torch.triu)
    _family("Tril", "Ti", torch.tril)
    _family("FastGelu", "T", lambda a: a * torch.sigmoid(1.702 * a))
    _family("SWhere", "TTT", lambda condition, a, b: torch.where(condition.bool(), a, b))


_register()


@operator("aclnnInplaceCopy", "TT")
def _copy(target: torch.Tensor, source: torch.Tensor) -> None:
    target.copy_(source)  # broadcasts, as Tensor.copy_ does


@operator("aclnnForeachCopy", "LL")
def _copy_each(sources: list[torch.Tensor], targets: list[torch.Tensor]) -> None:
    for target, source in zip(targets, sources, strict=True):
        write(target, source)


@operator("aclnnCast", "TeT")
def _cast(source: torch.Tensor, _dtype: int, out: torch.Tensor) -> None:
    write(out, source)


@operator("aclnnInplaceZero", "T")
def _zero(target: torch.Tensor) -> None:
    target.zero_()


@operator("aclnnInplaceOne", "T")
def _one(target: torch.Tensor) -> None:
    target.fill_(1)


@operator("aclnnInplaceFillScalar", "TS")
def _fill(target: torch.Tensor, value: float) -> None:
    target.fill_(value)


@operator("aclnnInplaceFillTensor", "TT")
def _fill_tensor(target: torch.Tensor, value: torch.Tensor) -> None:
    target.copy_(value.reshape(()))


@operator("aclnnInplaceMaskedFillScalar", "TTS")
def _masked_fill(target: torch.Tensor, mask: torch.Tensor, value: float) -> None:
    target.masked_fill_(mask.bool(), value)


@operator("aclnnInplaceMaskedFillTensor", "TTT")
def _masked_fill_tensor(target: torch.Tensor, mask: torch.Tensor, value: torch.Tensor) -> None:
    target.masked_fill_(mask.bool(), value.reshape(()).to(target.dtype))


@operator("aclnnInplaceFillDiagonal", "TSb")
def _fill_diagonal(target: torch.Tensor, value: float, wrap: bool) -> None:
    target.fill_diagonal_(value, wrap)


@operator("aclnnEqual", "TTT")
def _equal(left: torch.Tensor, right: torch.Tensor, out: torch.Tensor) -> None:
    out.fill_(torch.equal(left, right))


@operator("aclnnIsClose", "TTddbT")
def _is_close(
    left: torch.Tensor,
    right: torch.Tensor,
    rtol: float,
    atol: float,
    equal_nan: bool,
    out: torch.Tensor,
) -> None:
    write(out, torch.isclose(left, right, rtol, atol, equal_nan))


@operator("aclnnIsInTensorScalar", "TSbbT")
def _is_in(tensor: torch.Tensor, value: float, _unique: bool, invert: bool, out: Any) -> None:
    write(out, torch.isin(tensor, value, invert=invert))
