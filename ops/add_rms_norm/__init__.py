"""A residual that grows, and the RMS norm of what it became; or the RMS norm of rows."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass

import torch

from .. import checks, linear_checks
from ..dispatch import Implementation, Operator
from ..library import needs_dispatcher, register
from . import native, reference

__all__ = ["SCHEMA", "NormRequest", "add_rms_norm", "operator"]

SCHEMA = "add_rms_norm(Tensor x, Tensor(a!)? residual, Tensor weight, float epsilon=1e-6) -> Tensor"


@dataclass(frozen=True, slots=True)
class NormRequest:
    """What an implementation must know of a call to say whether it can serve it."""

    dtype: torch.dtype
    k: int


operator: Operator[NormRequest] = Operator(
    "add_rms_norm",
    (
        Implementation("native", native.supports, load=native.load),
        Implementation("reference", reference.supports, load=reference.load),
    ),
)


def add_rms_norm(
    x: torch.Tensor, residual: torch.Tensor | None, weight: torch.Tensor, epsilon: float = 1e-6
) -> torch.Tensor:
    """Add ``x`` to ``residual`` in place and return the norm of the sum; without one, of ``x``.

    ``s = x + residual``, ``out = s / sqrt(mean(s^2) + epsilon) * weight`` (arXiv:1910.07467), in
    float32. ``s`` is normed as it is; the residual becomes ``s`` rounded to its type, and the
    result is rounded once.

    Args:
        x: float32, float16 or bfloat16 ``[m, k]``, last dimension contiguous.
        residual: of the same shape and type, last dimension contiguous, written in place; or None.
        weight: ``[k]`` of the same type or float32, contiguous.
        epsilon: added to the mean square; not negative.

    Returns:
        ``[m, k]`` of the type of ``x``, contiguous.

    Raises:
        ValueError: shape, type or stride is not as above.
    """
    call = torch.ops.ascend_plugin.add_rms_norm if needs_dispatcher(x) else _cpu
    out: torch.Tensor = call(x, residual, weight, epsilon)
    return out


def _cpu(
    x: torch.Tensor, residual: torch.Tensor | None, weight: torch.Tensor, epsilon: float = 1e-6
) -> torch.Tensor:
    signature: Hashable = (
        x.dtype,
        x.shape[1:],
        x.stride()[1:],
        None if residual is None else (residual.dtype, residual.shape[1:], residual.stride()[1:]),
        epsilon,
        weight.dtype,
        weight.shape,
        weight.stride(),
    )
    kernel = operator.kernel(signature)
    if kernel is None:
        check_norm(x, residual, weight, epsilon)
        kernel = operator.load(signature, NormRequest(x.dtype, x.shape[1]))
    if residual is not None and residual.shape[0] != x.shape[0]:
        raise _differs(x, residual)
    out = torch.empty(x.shape, dtype=x.dtype)
    if x.shape[0]:
        kernel(x, residual, weight, epsilon, out)
    return out


def check_norm(
    x: torch.Tensor, residual: torch.Tensor | None, weight: torch.Tensor, epsilon: float
) -> None:
    """Refuse what no implementation takes.

    Raises:
        ValueError: see :func:`add_rms_norm`.
    """
    linear_checks.check_rows("x", x)
    checks.check_float("x", x.dtype)
    if residual is not None:
        linear_checks.check_rows("residual", residual)
        if residual.shape != x.shape:
            raise _differs(x, residual)
        if residual.dtype != x.dtype:
            raise ValueError(
                f"x and residual must be of one type, got {x.dtype} and {residual.dtype}; convert "
                "one."
            )
    if weight.dtype not in (x.dtype, torch.float32):
        raise ValueError(
            f"weight must be of the type of x, {x.dtype}, or float32; it is {weight.dtype}."
        )
    if weight.shape != x.shape[1:] or not weight.is_contiguous():
        raise ValueError(
            f"weight must be contiguous [{x.shape[1]}] (the columns of x), got "
            f"{list(weight.shape)} with strides {list(weight.stride())}."
        )
    if not epsilon >= 0:
        raise ValueError(f"epsilon {epsilon} must not be negative.")


def _differs(x: torch.Tensor, residual: torch.Tensor) -> ValueError:
    return ValueError(
        f"residual must have the shape of x, {list(x.shape)}; it is {list(residual.shape)}."
    )


def _fake(
    x: torch.Tensor, residual: torch.Tensor | None, weight: torch.Tensor, epsilon: float = 1e-6
) -> torch.Tensor:
    return x.new_empty(x.shape)


register(SCHEMA, cpu=_cpu, fake=_fake)
