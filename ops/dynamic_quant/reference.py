"""``dynamic_quant`` in plain torch: its meaning, to the bit."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

import torch

from ..dispatch import Support
from ..quantise import SMALLEST_SCALE, quantise_dynamic

if TYPE_CHECKING:
    from . import QuantRequest


class DynamicQuant(NamedTuple):
    """Rows in int8.

    Attributes:
        codes: int8 ``[m, k]``.
        scales: float32 ``[m]``.
        zeros: int32 ``[m]``; None: symmetric.
    """

    codes: torch.Tensor
    scales: torch.Tensor
    zeros: torch.Tensor | None


def supports(request: QuantRequest) -> Support:
    """Serve every request."""
    return Support(True, "plain torch")


def load() -> Callable[..., None]:
    """Return the kernel."""
    return dynamic_quant


def dynamic_quant(
    x: torch.Tensor, codes: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor | None
) -> None:
    """Write codes, scales and, unless None, zero points; arguments as in the operator."""
    found = quantise(x, zeros is None)
    codes.copy_(found.codes)
    scales.copy_(found.scales)
    if zeros is not None and found.zeros is not None:
        zeros.copy_(found.zeros)


def quantise(x: torch.Tensor, symmetric: bool) -> DynamicQuant:
    """Return the rows of ``x`` in int8; as in the operator."""
    if symmetric:
        rows = quantise_dynamic(x)
        return DynamicQuant(rows.codes, rows.scales, None)
    values = x.float()
    finite = values.isfinite().all(-1)
    values = values.masked_fill(~finite[:, None], 0.0)
    low, high = values.amin(-1).clamp(max=0.0), values.amax(-1).clamp(min=0.0)
    scales = high / 255.0 - low / 255.0
    scales = scales.masked_fill(scales < SMALLEST_SCALE, 0.0)
    inverse = (1.0 / scales).masked_fill(scales == 0.0, 0.0)
    zeros = (-128.0 - (low * inverse).round()).masked_fill(~finite, 0.0)
    codes = ((values * inverse[:, None]).round() + zeros[:, None]).clamp(-128.0, 127.0)
    return DynamicQuant(
        codes.to(torch.int8), scales.masked_fill(~finite, torch.nan), zeros.to(torch.int32)
    )
