"""Linear layer with 8-bit weights and activations (W8A8): exact integers, then one scale."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass

import torch

from .. import checks, linear_checks, packed_weight
from ..dispatch import Implementation, Operator
from ..library import needs_dispatcher, register
from . import native, reference

__all__ = ["SCHEMA", "Int8Request", "Int8Weight", "operator", "pack_int8", "quant_matmul"]

SCHEMA = (
    "quant_matmul(Tensor x, Tensor weight, Tensor column_sums, Tensor weight_scale, "
    "Tensor? x_scale, Tensor? x_zero, Tensor? quant_bias, Tensor? bias, ScalarType out_dtype) "
    "-> Tensor"
)

#: Sums of more products than this may not fit into 32 bits.
MAX_K = (2**31 - 1) // (128 * 256)

_INT32 = (torch.int32,)
_FLOAT32 = (torch.float32,)

#: The scale of rows that have none.
_ONE = torch.ones(1, dtype=torch.float32)


@dataclass(frozen=True, slots=True)
class Int8Weight:
    """An int8 weight in the order of a device's kernels.

    Attributes:
        weight: int32 ``[blocks, words, 32]``, as an 8-bit :class:`PackedWeight` holds it: the same
            tensor serves ``weight_quant_matmul`` too. On an NPU int8 ``[k, n]``, in NZ order.
        column_sums: int32 ``[blocks * 32]``, sums over k; 0 in the padding. Empty on an NPU.
        n: columns (output features).
        k: input features.
    """

    weight: torch.Tensor
    column_sums: torch.Tensor
    n: int
    k: int


@dataclass(frozen=True, slots=True)
class Int8Request:
    """What an implementation must know of a call to say whether it can serve it."""

    out_dtype: torch.dtype
    n: int
    k: int
    zeros: bool = False


operator: Operator[Int8Request] = Operator(
    "quant_matmul",
    (
        Implementation("native", native.supports, load=native.load),
        Implementation("reference", reference.supports, load=reference.load),
    ),
)


def pack_int8(weight: torch.Tensor) -> Int8Weight:
    """Put an int8 weight ``[n, k]`` into the CPU kernels' order, once at load.

    Raises:
        ValueError: not a matrix of int8, empty, or more than :data:`MAX_K` input features.
    """
    check_codes(weight)
    n, k = weight.shape
    sums = torch.zeros(packed_weight.blocks_of(n) * packed_weight.BLOCK, dtype=torch.int32)
    sums[:n] = weight.sum(1, dtype=torch.int32)
    return Int8Weight(packed_weight.pack_codes(weight, 8), sums, n, k)


def check_codes(weight: torch.Tensor) -> None:
    """Refuse what is no int8 weight, or too large for exact sums.

    Raises:
        ValueError: not a matrix of int8, empty, or more than :data:`MAX_K` input features.
    """
    if weight.dtype != torch.int8 or weight.dim() != 2 or 0 in weight.shape:
        raise ValueError(
            f"weight must be int8 [n, k] and not empty, got {weight.dtype} {list(weight.shape)}; "
            "use weight_quant_matmul for other weights."
        )
    _check_k(weight.shape[1])


def quant_matmul(
    x: torch.Tensor,
    weight: Int8Weight,
    weight_scale: torch.Tensor,
    x_scale: torch.Tensor | None = None,
    *,
    x_zero: torch.Tensor | None = None,
    quant_bias: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    out_dtype: torch.dtype = torch.bfloat16,
) -> torch.Tensor:
    """Return ``(x @ W.T - x_zero * sum(W) + quant_bias) * (x_scale * weight_scale) + bias``.

    What is in the first parentheses is computed in 32-bit integers, exactly, and rounded to float32
    once; the rest is float32.

    Args:
        x: int8 ``[m, k]``, last dimension contiguous.
        weight: of :func:`pack_int8`; on an NPU of :func:`ops.npu.quantised_linear.pack_int8`.
        weight_scale: float32 ``[n]``.
        x_scale: float32 ``[m]``, or ``[1]`` for all rows; None: 1.
        x_zero: int32 ``[m]`` or ``[1]``: the code that stands for 0; None: 0.
        quant_bias: int32 ``[n]``, added before scaling; None: none.
        bias: ``[n]``, of type ``out_dtype`` or float32, added after scaling; None: none.
        out_dtype: float32, float16 or bfloat16.

    Returns:
        ``[m, n]``.

    Raises:
        ValueError: a shape, type or stride is not as above.
    """
    call = torch.ops.ascend_plugin.quant_matmul if needs_dispatcher(x) else _cpu
    out: torch.Tensor = call(
        x,
        weight.weight,
        weight.column_sums,
        weight_scale,
        x_scale,
        x_zero,
        quant_bias,
        bias,
        out_dtype,
    )
    return out


def _cpu(
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
    if x_scale is None:
        x_scale = _ONE
    tensors = (x, weight, column_sums, weight_scale, x_scale, x_zero, quant_bias, bias)
    signature = _signature(*tensors, out_dtype)
    kernel = operator.kernel(signature)
    if kernel is None:
        _check(*tensors, out_dtype)
        request = Int8Request(out_dtype, weight_scale.shape[0], x.shape[1], x_zero is not None)
        kernel = operator.load(signature, request)
    out = torch.empty((x.shape[0], weight_scale.shape[0]), dtype=out_dtype)
    if x.shape[0]:
        kernel(*tensors, out)
    return out


def _signature(
    x: torch.Tensor,
    weight: torch.Tensor,
    column_sums: torch.Tensor,
    weight_scale: torch.Tensor,
    x_scale: torch.Tensor,
    x_zero: torch.Tensor | None,
    quant_bias: torch.Tensor | None,
    bias: torch.Tensor | None,
    out_dtype: torch.dtype,
) -> Hashable:
    """Return what checks and the choice depend on. It is flat: nested tuples hash slower."""
    return (
        x.dtype,
        x.shape,  # scales may be as many as rows
        x.stride()[1:],
        weight.dtype,
        weight.shape,
        weight.is_contiguous(),
        checks.kind(column_sums),
        checks.kind(weight_scale),
        checks.kind(x_scale),
        x_zero is None or checks.kind(x_zero),
        quant_bias is None or checks.kind(quant_bias),
        bias is None or checks.kind(bias),
        out_dtype,
    )


def _check(
    x: torch.Tensor,
    weight: torch.Tensor,
    column_sums: torch.Tensor,
    weight_scale: torch.Tensor,
    x_scale: torch.Tensor,
    x_zero: torch.Tensor | None,
    quant_bias: torch.Tensor | None,
    bias: torch.Tensor | None,
    out_dtype: torch.dtype,
) -> None:
    linear_checks.check_rows("x", x)
    if x.dtype != torch.int8:
        raise ValueError(f"x must be int8, got {x.dtype}; quantise it with dynamic_quant.")
    (m, k), n = x.shape, weight_scale.numel()
    _check_k(k)
    checks.check_float("the result", out_dtype)
    linear_checks.check_vector("weight_scale", weight_scale, _FLOAT32, (n,))
    words = packed_weight.words_of(k, 8)
    linear_checks.check_packed("weight", weight, torch.int32, n, words)
    padded = packed_weight.blocks_of(n) * packed_weight.BLOCK
    linear_checks.check_vector("column_sums", column_sums, _INT32, (padded,))
    linear_checks.check_vector("x_scale", x_scale, _FLOAT32, (m, 1))
    if x_zero is not None:
        linear_checks.check_vector("x_zero", x_zero, _INT32, (m, 1))
    if quant_bias is not None:
        linear_checks.check_vector("quant_bias", quant_bias, _INT32, (n,))
    linear_checks.check_bias(bias, n, out_dtype)


def _check_k(k: int) -> None:
    if k > MAX_K:
        raise ValueError(
            f"k={k} products may not fit into 32 bits; at most {MAX_K} are allowed. Split the "
            "layer, or use weight_quant_matmul."
        )


def _fake(
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
    return x.new_empty((x.shape[0], weight_scale.shape[0]), dtype=out_dtype)


register(SCHEMA, cpu=_cpu, fake=_fake)
