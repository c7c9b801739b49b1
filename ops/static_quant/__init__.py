"""Activations into int8, with one scale and zero point that are known before."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass

import torch

from .. import checks, linear_checks
from ..dispatch import Implementation, Operator
from ..library import needs_dispatcher, register
from . import native, reference

__all__ = ["SCHEMA", "StaticRequest", "check", "operator", "static_quant"]

SCHEMA = "static_quant(Tensor x, Tensor factor, Tensor zero) -> Tensor"


@dataclass(frozen=True, slots=True)
class StaticRequest:
    """What an implementation must know of a call to say whether it can serve it."""

    dtype: torch.dtype
    factor_dtype: torch.dtype


operator: Operator[StaticRequest] = Operator(
    "static_quant",
    (
        Implementation("native", native.supports, load=native.load),
        Implementation("reference", reference.supports, load=reference.load),
    ),
)


def static_quant(x: torch.Tensor, factor: torch.Tensor, zero: torch.Tensor) -> torch.Tensor:
    """Return ``rint(x * factor + zero)`` within -128 to 127, in float32; ties go to even.

    Product and sum are each rounded to float32. On a CPU the code of NaN is 0. A code stands for
    ``(code - zero) / factor``: checkpoints hold the reciprocal of ``factor`` as ``input_scale`` and
    ``zero`` as ``input_offset`` or ``input_zero_point``.

    Args:
        x: float32, float16 or bfloat16 ``[m, k]``, last dimension contiguous.
        factor: float ``[1]``; on an NPU of the type of ``x``.
        zero: ``[1]``, a whole number in the type of ``factor``.

    Returns:
        int8 ``[m, k]``.

    Raises:
        ValueError: a shape, type or stride is not as above.
    """
    call = torch.ops.ascend_plugin.static_quant if needs_dispatcher(x) else _cpu
    out: torch.Tensor = call(x, factor, zero)
    return out


def signature_of(x: torch.Tensor, factor: torch.Tensor, zero: torch.Tensor) -> Hashable:
    """Return what checks and the choice depend on."""
    return (x.dtype, x.shape[1:], x.stride()[1:], checks.kind(factor), checks.kind(zero))


def check(x: torch.Tensor, factor: torch.Tensor, zero: torch.Tensor) -> StaticRequest:
    """Refuse arguments of other shapes and types; return what an implementation must know.

    Raises:
        ValueError: see :func:`static_quant`.
    """
    linear_checks.check_rows("x", x)
    checks.check_float("x", x.dtype)
    linear_checks.check_vector("factor", factor, checks.FLOAT_DTYPES, (1,))
    linear_checks.check_vector("zero", zero, (factor.dtype,), (1,))
    return StaticRequest(x.dtype, factor.dtype)


def _cpu(x: torch.Tensor, factor: torch.Tensor, zero: torch.Tensor) -> torch.Tensor:
    signature = signature_of(x, factor, zero)
    kernel = operator.kernel(signature)
    if kernel is None:
        kernel = operator.load(signature, check(x, factor, zero))
    codes = torch.empty(x.shape, dtype=torch.int8)
    if x.shape[0]:
        kernel(x, factor, zero, codes)
    return codes


def _fake(x: torch.Tensor, factor: torch.Tensor, zero: torch.Tensor) -> torch.Tensor:
    return x.new_empty(x.shape, dtype=torch.int8)


register(SCHEMA, cpu=_cpu, fake=_fake)
