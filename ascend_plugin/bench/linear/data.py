"""Weights and activations of a case, the same for all contenders, and the right result."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from ascend_plugin.bench.linear.cases import LinearCase
from ascend_plugin.bench.parity import Parity
from ascend_plugin.ops.dynamic_quant import reference as quantise

#: Largest relative L2 error of the whole result: the rounding of bfloat16 and sums in other orders.
TOLERANCE = 5e-3
#: One row may be this much worse than the whole.
_ROW_FACTOR = 4.0
#: The oracle computes at most so many rows of a call: an even choice with both ends.
_MAX_ROWS = 48


@dataclass(frozen=True)
class LinearData:
    """A case's tensors.

    Attributes:
        case: what they belong to.
        x: bfloat16 ``[m, k]``.
        codes: int8 ``[n, k]``, two's complement; empty for bf16.
        scales: ``[n, k / group]``: bfloat16; float32 for w8a8; empty for bf16.
        zeros: int8 ``[n, k / group]`` or None.
        dense: bfloat16 ``[n, k]``, the weight as a model without quantisation would have it.
    """

    case: LinearCase
    x: torch.Tensor
    codes: torch.Tensor
    scales: torch.Tensor
    zeros: torch.Tensor | None
    dense: torch.Tensor


@dataclass(frozen=True)
class Oracle:
    """The right result of some rows.

    Attributes:
        rows: which.
        expected: float64 ``[rows, n]``.
    """

    rows: torch.Tensor
    expected: torch.Tensor

    def compare(self, result: torch.Tensor) -> Parity:
        """Compare a contender's ``[m, n]``; a result that is not finite is wrong."""
        difference = result[self.rows].double() - self.expected
        whole = float(difference.norm() / self.expected.norm())
        worst = float((difference.norm(dim=-1) / self.expected.norm(dim=-1)).max())
        ok = whole <= TOLERANCE and worst <= _ROW_FACTOR * TOLERANCE
        return Parity(ok, whole if math.isfinite(whole) else None)


def make_data(case: LinearCase) -> LinearData:
    """Draw a case's tensors."""
    generator = torch.Generator().manual_seed(0)
    if not case.quantised:
        return _dense_data(case, generator)
    half = 1 << (case.bits - 1)
    codes = torch.randint(-half, half, (case.n, case.k), dtype=torch.int8, generator=generator)
    if case.scheme == "w8a8":
        codes.clamp_(-127)
    groups = case.k // case.group
    scales = (torch.rand(case.n, groups, generator=generator) + 0.5) * (0.04 / half)
    scales = scales if case.scheme == "w8a8" else scales.bfloat16()
    zeros = None
    if case.zeros:
        zeros = torch.randint(-2, 2, (case.n, groups), dtype=torch.int8, generator=generator)
    x = torch.randn(case.m, case.k, generator=generator).bfloat16()
    data = LinearData(case, x, codes, scales, zeros, torch.empty(0))
    return LinearData(case, x, codes, scales, zeros, dequantise(data, torch.bfloat16))


def _dense_data(case: LinearCase, generator: torch.Generator) -> LinearData:
    dense = (torch.randn(case.n, case.k, generator=generator) * 0.02).bfloat16()
    x = torch.randn(case.m, case.k, generator=generator).bfloat16()
    return LinearData(case, x, torch.empty(0), torch.empty(0), None, dense)


def dequantise(data: LinearData, dtype: torch.dtype) -> torch.Tensor:
    """Return the weight ``[n, k]``."""
    if not data.case.quantised:
        return data.dense.to(dtype)
    compute = torch.float64 if dtype == torch.float64 else torch.float32
    grouped = data.codes.to(compute).unflatten(1, (-1, data.case.group))  # [n, groups, group]
    if data.zeros is not None:
        grouped -= data.zeros.to(compute)[..., None]
    grouped *= data.scales.to(compute)[..., None]
    return grouped.flatten(1).to(dtype)


def oracle(data: LinearData) -> Oracle:
    """Compute the case in float64, from the unpacked codes.

    For w8a8 activations are what dynamic quantisation makes of them, exactly.
    """
    m = data.case.m
    rows = torch.linspace(0, m - 1, min(m, _MAX_ROWS)).round().long()
    x = data.x[rows]
    activations = x.double()
    if data.case.scheme == "w8a8":
        quantised = quantise.quantise(x, True)
        activations = quantised.codes.double() * quantised.scales.double()[:, None]
    return Oracle(rows, activations @ dequantise(data, torch.float64).T)
