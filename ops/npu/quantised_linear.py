"""Linear layers with integer weights on an NPU, and int8 activations: the operators and packing.

What each path takes, and why it is chosen, is in :mod:`ops.npu_weights`. Weights are packed once,
at load, from signed codes on the host.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from functools import partial
from typing import Any

import torch
import torch_npu

from .. import linear_checks, npu_weights
from .. import static_quant as _static
from ..dispatch import Implementation, Operator
from ..dynamic_quant import QuantRequest
from ..npu_weights import CODES_PER_WORD
from ..packed_weight import PackedWeight
from ..quant_matmul import Int8Request, Int8Weight, check_codes
from ..static_quant import StaticRequest
from ..weight_quant_matmul import LinearRequest
from .linear import FORMAT_NZ

_NAME = "npu"


# ---- packing ----


def to_nz(codes: torch.Tensor) -> torch.Tensor:
    """Return int8 ``[..., k, n]`` on the device with its elements in NZ order, cast once.

    Codes that are no whole fractals stay in ND order, which the products take too.
    """
    if not npu_weights.whole_fractals(codes.shape[-1], codes.shape[-2]):
        return codes
    # torch_npu keeps tensors in private formats only when it is allowed to.
    torch_npu.npu.config.allow_internal_format = True
    out: torch.Tensor = torch_npu.npu_format_cast(codes, FORMAT_NZ)
    return out


def pack_words(codes: torch.Tensor) -> torch.Tensor:
    """Return int32 ``[..., columns / 8]`` of signed 4-bit codes int8 ``[..., columns]``.

    The first code is in the lowest bits, as ``npu_convert_weight_to_int4pack`` orders it. That
    function takes an int32 per code on the device and packs on the host: eight times the weight
    would travel twice.
    """
    out = torch.zeros(*codes.shape[:-1], codes.shape[-1] // CODES_PER_WORD, dtype=torch.int32)
    for i in range(CODES_PER_WORD):
        out |= (codes[..., i::CODES_PER_WORD].int() & 15) << (4 * i)
    return out


def pack_int8(codes: torch.Tensor, device: torch.device) -> Int8Weight:
    """Put signed codes int8 ``[n, k]`` into the order of ``npu_quant_matmul``.

    Raises:
        ValueError: not a matrix of int8, or empty, or too large for exact sums.
    """
    check_codes(codes)
    n, k = codes.shape
    weight = to_nz(codes.t().contiguous().to(device))
    return Int8Weight(weight, torch.empty(0, dtype=torch.int32, device=device), n, k)


def pack_weight(
    codes: torch.Tensor,
    scales: torch.Tensor,
    zeros: torch.Tensor | None,
    *,
    bits: int,
    group: int,
    dtype: torch.dtype,
    device: torch.device,
) -> PackedWeight:
    """Put a weight-only quantised weight into the order of ``npu_weight_quant_batchmatmul``.

    Args:
        codes: signed int8 ``[n, k]``, within ``bits`` bits.
        scales: float ``[n, k / group]``; rounded to ``dtype``, which the operator wants.
        zeros: int8 ``[n, k / group]``; None: 0.
        bits: 4 or 8.
        group: k that share a scale; k: a scale per column.
        dtype: of the activations.
        device: where the weight will lie.

    Raises:
        ValueError: a shape, type or value is not as above.
        UnsupportedRequestError: the operator does not take such a weight.
    """
    linear_checks.check_codes(codes, bits, group)
    n, k = codes.shape
    linear_checks.check_group_values("scales", scales, n, k // group)
    linear_checks.signed_codes("codes", codes, bits, 0)
    request = LinearRequest(dtype, scales.dtype, n, k, group, bits, zeros is not None)
    weight_only.choose(request)
    if group == k:
        # Transposed, as the documentation recommends where a column has one scale.
        words = codes.contiguous() if bits == 8 else pack_words(codes)
        weight = words.to(device).t()
    else:
        rows = codes.t().contiguous()
        weight = (rows if bits == 8 else pack_words(rows)).to(device)
    offsets = None
    if zeros is not None:
        linear_checks.check_group_values("zeros", zeros, n, k // group)
        offsets = _per_group(-zeros.to(torch.float32), dtype, device)
    return PackedWeight(weight, _per_group(scales, dtype, device), offsets, n, k, group, bits)


def _per_group(values: torch.Tensor, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Return ``[n]`` or ``[groups, n]`` of ``[n, groups]``."""
    by_group = values.t().to(dtype).contiguous().to(device)
    return by_group[0] if by_group.shape[0] == 1 else by_group


# ---- int8 by int8 ----


def quant_matmul(
    x: torch.Tensor,
    weight: torch.Tensor,
    column_sums: torch.Tensor,
    weight_scale: torch.Tensor,
    x_scale: torch.Tensor | None,
    x_zero: torch.Tensor | None,
    quant_bias: torch.Tensor | None,
    bias: torch.Tensor | None,
    out_dtype: torch.dtype,
) -> torch.Tensor:
    """Return the scaled product; arguments and errors as in :func:`ops.quant_matmul.quant_matmul`.

    ``weight`` and ``column_sums`` are those of :func:`pack_int8`; there are no zero points.
    """
    given = (weight, weight_scale, x_scale, quant_bias, bias)
    signature: Hashable = (
        (x.dtype, x.shape, out_dtype, x_zero is None),
        tuple(each is None or (each.dtype, each.shape) for each in given),
    )
    kernel = int8.kernel(signature)
    if kernel is None:
        n = weight_scale.shape[-1]
        request = Int8Request(out_dtype, n, x.shape[-1], x_zero is not None)
        int8.choose(request)
        _check_int8(x, *given, out_dtype)
        kernel = int8.load(signature, request)
    if not x.shape[0]:
        return x.new_empty((0, weight_scale.shape[0]), dtype=out_dtype)
    out: torch.Tensor = kernel(x, weight, weight_scale, x_scale, quant_bias, bias, out_dtype)
    return out


def _check_int8(
    x: torch.Tensor,
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    x_scale: torch.Tensor | None,
    quant_bias: torch.Tensor | None,
    bias: torch.Tensor | None,
    out_dtype: torch.dtype,
) -> None:
    linear_checks.check_rows("x", x)
    if x.dtype != torch.int8:
        raise ValueError(f"x must be int8, got {x.dtype}; quantise it with dynamic_quant.")
    (m, k), n = x.shape, weight_scale.numel()
    if weight.dtype != torch.int8 or list(weight.shape) != [k, n]:
        raise ValueError(
            f"weight must be int8 [{k}, {n}], got {weight.dtype} {list(weight.shape)}; make it "
            "with pack_int8, and give the x and weight_scale that belong to it."
        )
    linear_checks.check_vector("weight_scale", weight_scale, (torch.float32,), (n,))
    if x_scale is not None:
        linear_checks.check_vector("x_scale", x_scale, (torch.float32,), (m, 1))
    if quant_bias is not None:
        linear_checks.check_vector("quant_bias", quant_bias, (torch.int32,), (n,))
    linear_checks.check_bias(bias, n, out_dtype)


def _int8_product(
    x: torch.Tensor,
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    x_scale: torch.Tensor | None,
    quant_bias: torch.Tensor | None,
    bias: torch.Tensor | None,
    out_dtype: torch.dtype,
) -> torch.Tensor:
    rows = x.shape[0]
    if x_scale is None and out_dtype == torch.float16:
        # Without scales of rows the operator would cut those of columns to 19 bits.
        x_scale = weight_scale.new_ones(rows)
    elif x_scale is not None and x_scale.shape[0] != rows:
        x_scale = x_scale.expand(rows).contiguous()
    # One of both is added by the operator: integers before it scales, floats after.
    inside, after = (bias, None) if quant_bias is None else (quant_bias, bias)
    out: torch.Tensor = torch_npu.npu_quant_matmul(
        x.contiguous(),
        weight,
        weight_scale,
        pertoken_scale=x_scale,
        bias=_addable(inside),
        output_dtype=out_dtype,
    )
    return out if after is None else out.add_(after)


def _addable(bias: torch.Tensor | None) -> torch.Tensor | None:
    """Return a bias in a type that every row of the operator's table lists."""
    return bias.float() if bias is not None and bias.dtype == torch.float16 else bias


# ---- integers by floats ----


def weight_quant_matmul(
    x: torch.Tensor,
    weight: torch.Tensor,
    scales: torch.Tensor,
    zeros: torch.Tensor | None,
    bias: torch.Tensor | None,
    n: int,
    group: int,
    bits: int,
) -> torch.Tensor:
    """Return ``x @ W.T + bias``; as :func:`ops.weight_quant_matmul.weight_quant_matmul`.

    ``weight``, ``scales`` and ``zeros`` are those of :func:`pack_weight`.
    """
    given = (weight, scales, zeros, bias)
    signature: Hashable = (
        (x.dtype, x.shape[1:], n, group, bits),
        tuple(each is None or (each.dtype, each.shape) for each in given),
    )
    kernel = weight_only.kernel(signature)
    if kernel is None:
        k = x.shape[-1]
        request = LinearRequest(x.dtype, scales.dtype, n, k, group, bits, zeros is not None)
        weight_only.choose(request)
        _check_weight_only(x, *given, n, group, bits)
        kernel = weight_only.load(signature, request)
    if not x.shape[0]:
        return x.new_empty((0, n))
    out: torch.Tensor = kernel(x, *given, group)
    return out


def _check_weight_only(
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
    linear_checks.check_bits(bits)
    k = x.shape[1]
    linear_checks.check_group(k, group)
    packed = [k, n]
    if bits == 4:
        packed[0 if group == k else 1] //= CODES_PER_WORD
    dtype = torch.int8 if bits == 8 else torch.int32
    if weight.dtype != dtype or list(weight.shape) != packed:
        raise ValueError(
            f"weight must be {dtype} {packed}, got {weight.dtype} {list(weight.shape)}; make it "
            "with pack_weight, and give the x, n, group and bits that belong to it."
        )
    shape = [n] if group == k else [k // group, n]
    for name, values in (("scales", scales), ("zeros", zeros)):
        if values is not None and (values.dtype != x.dtype or list(values.shape) != shape):
            raise ValueError(
                f"{name} must be {x.dtype} {shape}, got {values.dtype} {list(values.shape)}; the "
                "operator wants the type of x: pack the weight for it."
            )
    linear_checks.check_bias(bias, n, x.dtype)


def _weight_only_product(
    x: torch.Tensor,
    weight: torch.Tensor,
    scales: torch.Tensor,
    zeros: torch.Tensor | None,
    bias: torch.Tensor | None,
    group: int,
) -> torch.Tensor:
    wanted = torch.float32 if x.dtype == torch.bfloat16 else x.dtype
    out: torch.Tensor = torch_npu.npu_weight_quant_batchmatmul(
        x.contiguous(),
        weight,
        scales,
        antiquant_offset=zeros,
        bias=None if bias is None else bias.to(wanted),
        antiquant_group_size=0 if group == x.shape[1] else group,
    )
    return out


# ---- activations ----


def dynamic_quant(
    x: torch.Tensor, symmetric: bool = True
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Quantise rows by their own range; as :func:`ops.dynamic_quant.dynamic_quant`."""
    signature: Hashable = (x.dtype, x.shape[1:], x.stride()[1:], symmetric)
    kernel = rows.kernel(signature)
    if kernel is None:
        linear_checks.check_rows("x", x)
        kernel = rows.load(signature, QuantRequest(x.dtype, x.shape[1], symmetric))
    zeros = torch.empty(0, dtype=torch.int32, device=x.device)
    if not x.shape[0]:
        return x.new_empty(x.shape, dtype=torch.int8), x.new_empty(0, dtype=torch.float32), zeros
    codes, scales = kernel(x)
    return codes, scales, zeros


def _quantise_rows(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    codes, scales = torch_npu.npu_dynamic_quant(x)
    return codes, scales


def static_quant(x: torch.Tensor, factor: torch.Tensor, zero: torch.Tensor) -> torch.Tensor:
    """Quantise with given numbers; as :func:`ops.static_quant.static_quant`."""
    signature = _static.signature_of(x, factor, zero)
    kernel = given_numbers.kernel(signature)
    if kernel is None:
        kernel = given_numbers.load(signature, _static.check(x, factor, zero))
    if not x.shape[0]:
        return x.new_empty(x.shape, dtype=torch.int8)
    out: torch.Tensor = kernel(x, factor, zero)
    return out


def _quantise_given(x: torch.Tensor, factor: torch.Tensor, zero: torch.Tensor) -> torch.Tensor:
    # div_mode=False: the mode that divides takes zero points in other types than scales.
    out: torch.Tensor = torch_npu.npu_quantize(x, factor, zero, torch.qint8, -1, False)
    return out


def _operator(name: str, supports: Callable[[Any], Any], kernel: Callable[..., Any]) -> Any:
    implementation = Implementation(_NAME, supports, load=partial(_self, kernel))
    return Operator(f"{name} (npu)", (implementation,))


def _self(kernel: Callable[..., Any]) -> Callable[..., Any]:
    return kernel


int8: Operator[Int8Request] = _operator("quant_matmul", npu_weights.quant_matmul, _int8_product)
weight_only: Operator[LinearRequest] = _operator(
    "weight_quant_matmul", npu_weights.weight_quant_matmul, _weight_only_product
)
rows: Operator[QuantRequest] = _operator("dynamic_quant", npu_weights.dynamic_quant, _quantise_rows)
given_numbers: Operator[StaticRequest] = _operator(
    "static_quant", npu_weights.static_quant, _quantise_given
)

#: The kernels of this module by the operators of the plugin.
KERNELS: dict[str, Callable[..., Any]] = {
    "quant_matmul": quant_matmul,
    "weight_quant_matmul": weight_quant_matmul,
    "dynamic_quant": dynamic_quant,
    "static_quant": static_quant,
}

__all__ = ["KERNELS", "pack_int8", "pack_weight", "pack_words", "to_nz"]
