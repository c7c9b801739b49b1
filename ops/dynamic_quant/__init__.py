"""Activations into int8, with a scale per row (token)."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass

import torch

from .. import checks, linear_checks
from ..dispatch import Implementation, Operator
from ..library import needs_dispatcher, register
from . import native, reference
from .reference import DynamicQuant

__all__ = ["SCHEMA", "DynamicQuant", "QuantRequest", "dynamic_quant", "operator"]

SCHEMA = "dynamic_quant(Tensor x, bool symmetric=True) -> (Tensor, Tensor, Tensor)"


@dataclass(frozen=True, slots=True)
class QuantRequest:
    """What an implementation must know of a call to say whether it can serve it."""

    dtype: torch.dtype
    k: int
    symmetric: bool


operator: Operator[QuantRequest] = Operator(
    "dynamic_quant",
    (
        Implementation("native", native.supports, load=native.load),
        Implementation("reference", reference.supports, load=reference.load),
    ),
)


def dynamic_quant(x: torch.Tensor, symmetric: bool = True) -> DynamicQuant:
    """Quantise each row by its own range.

    Symmetric: ``scale = max|x| / 127``, ``code = rint(x / scale)`` within -127 to 127. Otherwise,
    with ``low = min(x, 0)`` and ``high = max(x, 0)``: ``scale = high / 255 - low / 255``,
    ``zero = -128 - rint(low / scale)``, ``code = rint(x / scale) + zero`` within -128 to 127. A row
    stands for ``(code - zero) * scale``. All in float32, the division as a product with the
    reciprocal; ties go to even. A scale below 2^-126 becomes 0, and so do the codes; a row with a
    NaN or an infinity has the scale NaN, codes and zero point 0.

    Args:
        x: float32, float16 or bfloat16 ``[m, k]``, last dimension contiguous.
        symmetric: whether to do without zero points.

    Returns:
        Codes int8 ``[m, k]``, scales float32 ``[m]`` and zero points int32 ``[m]`` (None when
        symmetric).

    Raises:
        ValueError: shape, type or stride is not as above.
    """
    call = torch.ops.ascend_plugin.dynamic_quant if needs_dispatcher(x) else _cpu
    codes, scales, zeros = call(x, symmetric)
    return DynamicQuant(codes, scales, None if symmetric else zeros)


def _cpu(
    x: torch.Tensor, symmetric: bool = True
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    signature: Hashable = (x.dtype, x.shape[1:], x.stride()[1:], symmetric)
    kernel = operator.kernel(signature)
    if kernel is None:
        linear_checks.check_rows("x", x)
        checks.check_float("x", x.dtype)
        kernel = operator.load(signature, QuantRequest(x.dtype, x.shape[1], symmetric))
    codes, scales, zeros = _outputs(x, symmetric)
    if x.shape[0]:
        kernel(x, codes, scales, None if symmetric else zeros)
    return codes, scales, zeros


def _outputs(x: torch.Tensor, symmetric: bool) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    m, k = x.shape
    codes = torch.empty((m, k), dtype=torch.int8, device=x.device)
    scales = torch.empty(m, dtype=torch.float32, device=x.device)
    return codes, scales, torch.empty(0 if symmetric else m, dtype=torch.int32, device=x.device)


def _fake(
    x: torch.Tensor, symmetric: bool = True
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return _outputs(x, symmetric)


register(SCHEMA, cpu=_cpu, fake=_fake)
