"""Rows times weights as the checkpoint holds them: a linear layer without quantisation."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass

import torch

from .. import checks, linear_checks
from ..dispatch import Implementation, Operator
from ..library import needs_dispatcher, register
from . import native, reference

__all__ = ["SCHEMA", "DenseRequest", "check_dense", "dense_matmul", "operator"]

SCHEMA = "dense_matmul(Tensor x, Tensor weights, Tensor? bias=None) -> Tensor"


@dataclass(frozen=True, slots=True)
class DenseRequest:
    """What an implementation must know of a call to say whether it can serve it."""

    dtype: torch.dtype
    n: int
    k: int


operator: Operator[DenseRequest] = Operator(
    "dense_matmul",
    (
        Implementation("native", native.supports, load=native.load),
        Implementation("reference", reference.supports, load=reference.load),
    ),
)


def dense_matmul(
    x: torch.Tensor, weights: torch.Tensor, bias: torch.Tensor | None = None
) -> torch.Tensor:
    """Return ``x @ weights.T + bias``, sums in float32 and rounded once.

    Args:
        x: float32, float16 or bfloat16 ``[m, k]``, last dimension contiguous.
        weights: ``[n, k]`` of the same type, last dimension contiguous; read where they lie.
        bias: ``[n]`` of the same type, contiguous; or None.

    Returns:
        ``[m, n]`` of the type of ``x``, contiguous.

    Raises:
        ValueError: shape, type or stride is not as above.
    """
    call = torch.ops.ascend_plugin.dense_matmul if needs_dispatcher(x) else _cpu
    out: torch.Tensor = call(x, weights, bias)
    return out


def _cpu(x: torch.Tensor, weights: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    signature: Hashable = (
        x.dtype,
        x.shape[1:],
        x.stride()[1:],
        weights.dtype,
        weights.shape,
        weights.stride(),
        None if bias is None else (bias.dtype, bias.shape, bias.stride()),
    )
    kernel = operator.kernel(signature)
    if kernel is None:
        check_dense(x, weights, bias)
        kernel = operator.load(signature, DenseRequest(x.dtype, *weights.shape))
    out: torch.Tensor = kernel(x, weights, bias)
    return out


def check_dense(x: torch.Tensor, weights: torch.Tensor, bias: torch.Tensor | None) -> None:
    """Refuse what no implementation takes.

    Raises:
        ValueError: see :func:`dense_matmul`.
    """
    linear_checks.check_rows("x", x)
    linear_checks.check_rows("weights", weights)
    checks.check_float("x", x.dtype)
    if weights.dtype != x.dtype:
        raise ValueError(
            f"x and weights must be of one type, got {x.dtype} and {weights.dtype}; convert one."
        )
    if weights.shape[1] != x.shape[1]:
        raise ValueError(
            f"weights must be [columns, {x.shape[1]}] (the columns of x), got "
            f"{list(weights.shape)}; transpose them, or give the x that belongs to them."
        )
    if bias is not None:
        linear_checks.check_vector("bias", bias, (x.dtype,), (weights.shape[0],))


def _fake(x: torch.Tensor, weights: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    return x.new_empty((x.shape[0], weights.shape[0]))


register(SCHEMA, cpu=_cpu, fake=_fake)
