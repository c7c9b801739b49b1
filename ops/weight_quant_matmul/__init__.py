"""Linear layer with 4- or 8-bit weights and 16- or 32-bit activations (W4A16, W8A16)."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass

import torch

from .. import checks, linear_checks, packed_weight
from ..dispatch import Implementation, Operator
from ..library import needs_dispatcher, register
from ..packed_weight import PackedWeight
from . import native, reference

__all__ = ["SCHEMA", "LinearRequest", "PackedWeight", "operator", "pack", "weight_quant_matmul"]

SCHEMA = (
    "weight_quant_matmul(Tensor x, Tensor weight, Tensor scales, Tensor? zeros, Tensor? bias, "
    "int n, int group, int bits) -> Tensor"
)


@dataclass(frozen=True, slots=True)
class LinearRequest:
    """What an implementation must know of a call to say whether it can serve it."""

    dtype: torch.dtype
    scale_dtype: torch.dtype
    n: int
    k: int
    group: int
    bits: int
    zeros: bool = False


operator: Operator[LinearRequest] = Operator(
    "weight_quant_matmul",
    (
        Implementation("native", native.supports, load=native.load),
        Implementation("reference", reference.supports, load=reference.load),
    ),
)


def pack(
    codes: torch.Tensor,
    scales: torch.Tensor,
    zeros: torch.Tensor | None = None,
    *,
    bits: int,
    group: int,
) -> PackedWeight:
    """Put a quantised weight into the kernels' order, once at load.

    A weight is ``(code - zero) * scale``; scale and zero belong to a column (output feature) and
    ``group`` consecutive k (input features).

    Args:
        codes: ``[n, k]``, int8 (two's complement) or uint8, within ``bits`` bits.
        scales: float32, float16 or bfloat16 ``[n, k / group]``; the type is kept.
        zeros: integers ``[n, k / group]`` in the numbering of ``codes``. None: 0 for int8 codes,
            the middle (8 or 128) for uint8 ones.
        bits: 4 or 8.
        group: a multiple of 32 that divides k, or k itself (a scale per column).

    Raises:
        ValueError: a shape, type or value is not as above.
    """
    linear_checks.check_codes(codes, bits, group)
    n, k = codes.shape
    linear_checks.check_group_values("scales", scales, n, k // group)
    checks.check_float("scales", scales.dtype)
    middle = 1 << (bits - 1) if codes.dtype == torch.uint8 else 0
    signed = linear_checks.signed_codes("codes", codes, bits, middle)
    packed_zeros = None
    if zeros is not None:
        linear_checks.check_group_values("zeros", zeros, n, k // group)
        packed_zeros = packed_weight.pack_columns(
            linear_checks.signed_codes("zeros", zeros, bits, middle)
        )
    return PackedWeight(
        packed_weight.pack_codes(signed, bits),
        packed_weight.pack_columns(scales),
        packed_zeros,
        n,
        k,
        group,
        bits,
    )


def weight_quant_matmul(
    x: torch.Tensor, packed: PackedWeight, bias: torch.Tensor | None = None
) -> torch.Tensor:
    """Return ``x @ W.T + bias`` with ``W = (codes - zeros) * scales``.

    Products of ``x`` with the integers are exact and summed in float32 per group; scales meet the
    sums. (The reference multiplies dequantised float32 weights.)

    Args:
        x: float32, float16 or bfloat16 ``[m, k]``, last dimension contiguous.
        packed: of :func:`pack`; on an NPU of :func:`ops.npu.quantised_linear.pack_weight`.
        bias: ``[n]``, of the type of ``x`` or float32; None: none.

    Returns:
        ``[m, n]``, of the type of ``x``.

    Raises:
        ValueError: a shape, type or stride is not as above.
    """
    call = torch.ops.ascend_plugin.weight_quant_matmul if needs_dispatcher(x) else _cpu
    p = packed
    out: torch.Tensor = call(x, p.weight, p.scales, p.zeros, bias, p.n, p.group, p.bits)
    return out


def _cpu(
    x: torch.Tensor,
    weight: torch.Tensor,
    scales: torch.Tensor,
    zeros: torch.Tensor | None,
    bias: torch.Tensor | None,
    n: int,
    group: int,
    bits: int,
) -> torch.Tensor:
    signature = _signature(x, weight, scales, zeros, bias, n, group, bits)
    kernel = operator.kernel(signature)
    if kernel is None:
        _check(x, weight, scales, zeros, bias, n, group, bits)
        request = LinearRequest(
            x.dtype, scales.dtype, n, x.shape[1], group, bits, zeros is not None
        )
        kernel = operator.load(signature, request)
    out = torch.empty((x.shape[0], n), dtype=x.dtype)
    if x.shape[0]:
        kernel(x, weight, scales, zeros, bias, out, group, bits)
    return out


def _signature(
    x: torch.Tensor,
    weight: torch.Tensor,
    scales: torch.Tensor,
    zeros: torch.Tensor | None,
    bias: torch.Tensor | None,
    n: int,
    group: int,
    bits: int,
) -> Hashable:
    """Return what checks and the choice depend on. It is flat: nested tuples hash slower."""
    return (
        x.dtype,
        x.shape[1:],
        x.stride()[1:],
        weight.dtype,
        weight.shape,
        weight.is_contiguous(),
        scales.dtype,
        scales.shape,
        scales.is_contiguous(),
        zeros is None or checks.kind(zeros),
        bias is None or checks.kind(bias),
        n,
        group,
        bits,
    )


def _check(
    x: torch.Tensor,
    weight: torch.Tensor,
    scales: torch.Tensor,
    zeros: torch.Tensor | None,
    bias: torch.Tensor | None,
    n: int,
    group: int,
    bits: int,
) -> None:
    linear_checks.check_rows("x", x)
    checks.check_float("x", x.dtype)
    k = x.shape[1]
    linear_checks.check_bits(bits)
    linear_checks.check_group(k, group)
    linear_checks.check_packed("weight", weight, torch.int32, n, packed_weight.words_of(k, bits))
    checks.check_float("scales", scales.dtype)
    linear_checks.check_packed("scales", scales, scales.dtype, n, k // group)
    if zeros is not None:
        linear_checks.check_packed("zeros", zeros, torch.int8, n, k // group)
    linear_checks.check_bias(bias, n, x.dtype)


def _fake(
    x: torch.Tensor,
    weight: torch.Tensor,
    scales: torch.Tensor,
    zeros: torch.Tensor | None,
    bias: torch.Tensor | None,
    n: int,
    group: int,
    bits: int,
) -> torch.Tensor:
    return x.new_empty((x.shape[0], n))


register(SCHEMA, cpu=_cpu, fake=_fake)
