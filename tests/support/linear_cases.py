"""Quantised linear layers for tests: drawn codes, scales and activations."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ascend_plugin.ops.weight_quant_matmul import PackedWeight, pack

#: Largest relative L2 error of a right result: the output's own rounding, and sums in float32.
TOLERANCES = {torch.bfloat16: 3e-3, torch.float16: 5e-4, torch.float32: 3e-6}


@dataclass(frozen=True, slots=True)
class Linear:
    """What a call looks like."""

    m: int = 3
    n: int = 70
    k: int = 128
    group: int = 32  # 0: k
    bits: int = 4
    unsigned: bool = False
    zeros: bool = False
    bias: str = ""  # "", "same" or "float32"
    dtype: torch.dtype = torch.bfloat16
    scale_dtype: torch.dtype = torch.bfloat16
    strided: bool = False
    seed: int = 0

    @property
    def group_size(self) -> int:
        return self.group or self.k


@dataclass(frozen=True)
class Tensors:
    """A drawn call."""

    x: torch.Tensor
    packed: PackedWeight
    bias: torch.Tensor | None
    dense: torch.Tensor  # float64 [n, k], from the unpacked codes

    def oracle(self) -> torch.Tensor:
        product = self.x.double() @ self.dense.T
        return product if self.bias is None else product + self.bias.double()


def draw(linear: Linear) -> Tensors:
    """Draw a call; what lies between the rows of strided activations is NaN."""
    generator = torch.Generator().manual_seed(linear.seed)
    n, k, group = linear.n, linear.k, linear.group_size
    low = 0 if linear.unsigned else -(1 << (linear.bits - 1))
    high = low + (1 << linear.bits)
    kind = torch.uint8 if linear.unsigned else torch.int8
    codes = torch.randint(low, high, (n, k), generator=generator).to(kind)
    scales = (torch.rand(n, k // group, generator=generator) + 0.5) / high.bit_length()
    scales = scales.to(linear.scale_dtype)
    zeros = None
    middle = (1 << (linear.bits - 1)) if linear.unsigned else 0
    if linear.zeros:
        zeros = torch.randint(low, high, (n, k // group), generator=generator).to(kind)
    shift = zeros.double() if zeros is not None else torch.full((n, k // group), float(middle))
    columns = torch.arange(k) // group
    dense = (codes.double() - shift[:, columns]) * scales.double()[:, columns]
    padding = 5 if linear.strided else 0
    rows = torch.full((linear.m, k + padding), torch.nan, dtype=linear.dtype)
    rows[:, :k] = torch.randn(linear.m, k, generator=generator).to(linear.dtype)
    bias = None
    if linear.bias:
        bias_dtype = linear.dtype if linear.bias == "same" else torch.float32
        bias = torch.randn(n, generator=generator).to(bias_dtype)
    packed = pack(codes, scales, zeros, bits=linear.bits, group=group)
    return Tensors(rows[:, :k], packed, bias, dense)


def relative_error(result: torch.Tensor, expected: torch.Tensor) -> float:
    """Return the relative L2 error against float64; infinity where it is not finite."""
    if not bool(result.isfinite().all()):
        return float("inf")
    norm = expected.norm()
    return float((result.double() - expected).norm() / (norm if norm else 1.0))
