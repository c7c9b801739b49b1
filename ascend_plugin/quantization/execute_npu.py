"""The kernels of quantised linear layers on an NPU.

Weights are packed on the host and moved once; the device never holds a 16-bit copy.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch

from ascend_plugin.ops.dynamic_quant import dynamic_quant
from ascend_plugin.ops.npu import linear, quantised_linear
from ascend_plugin.ops.npu_weights import MAX_FEATURES
from ascend_plugin.ops.quant_matmul import quant_matmul
from ascend_plugin.ops.static_quant import static_quant
from ascend_plugin.ops.weight_quant_matmul import weight_quant_matmul

from .execute import LinearKernel, Operand, input_numbers
from .plan import Kernel

#: Columns of one product: whole fractals below the operators' limit.
_MOST_COLUMNS = MAX_FEATURES // 32 * 32


class FloatKernel(LinearKernel):
    """The cube unit's product, for float parts of a module whose others are quantised."""

    def __init__(
        self, weight: torch.Tensor, bias: torch.Tensor | None, device: torch.device
    ) -> None:
        """Bring a weight ``[n, k]`` into NZ order."""
        super().__init__(None if bias is None else bias.to(device))
        self.weight: torch.Tensor
        self.register_buffer("weight", linear.to_nz(weight.to(device)), persistent=False)

    def forward(self, x: torch.Tensor, add_bias: bool) -> torch.Tensor:
        """Multiply."""
        return linear.linear(x, self.weight, self._bias(add_bias))


class WeightOnlyKernel(LinearKernel):
    """``npu_weight_quant_batchmatmul``: inputs stay as they are."""

    def __init__(self, operand: Operand) -> None:
        """Pack the codes."""
        # The operator wants biases of bfloat16 models in float32.
        wanted = torch.float32 if operand.dtype == torch.bfloat16 else operand.dtype
        super().__init__(_moved(operand, operand.bias, wanted))
        codes = operand.codes
        self.packed = quantised_linear.pack_weight(
            codes.codes,
            codes.scales,
            codes.zeros,
            bits=operand.bits,
            group=operand.group,
            dtype=operand.dtype,
            device=operand.device,
        )

    def forward(self, x: torch.Tensor, add_bias: bool) -> torch.Tensor:
        """Multiply."""
        out: torch.Tensor = weight_quant_matmul(x, self.packed, self._bias(add_bias))
        return out


class DynamicInt8Kernel(LinearKernel):
    """``npu_dynamic_quant`` per token, then ``npu_quant_matmul``."""

    def __init__(self, operand: Operand) -> None:
        """Pack the codes."""
        super().__init__(_moved(operand, operand.bias, torch.float32))
        self.scale: torch.Tensor
        self.packed = quantised_linear.pack_int8(operand.codes.codes, operand.device)
        scale = _moved(operand, operand.codes.scales.flatten(), torch.float32)
        self.register_buffer("scale", scale, persistent=False)

    def forward(self, x: torch.Tensor, add_bias: bool) -> torch.Tensor:
        """Quantise the rows, and multiply."""
        rows = dynamic_quant(x)
        return quant_matmul(
            rows.codes,
            self.packed,
            self.scale,
            rows.scales,
            bias=self._bias(add_bias),
            out_dtype=x.dtype,
        )


class StaticInt8Kernel(LinearKernel):
    """``npu_quantize`` with the checkpoint's numbers, then ``npu_quant_matmul``.

    Integers are exact up to the final scale. ``npu_quantize`` multiplies with a factor of the
    input's type; what 16 bits lose of it moves into the final scale, so that codes stand for what
    they are scaled with, and only the end of their range moves, by less than half a percent.
    """

    def __init__(self, operand: Operand) -> None:
        """Pack the codes, and give each its place in integer bias and scale."""
        super().__init__(_moved(operand, operand.bias, torch.float32))
        assert operand.static is not None
        self.scale: torch.Tensor
        self.factor: torch.Tensor
        self.zero: torch.Tensor
        self.quant_bias: torch.Tensor | None
        factor, zero = input_numbers(operand.static, operand.dtype)
        if not bool(torch.isfinite(factor).all()):
            raise ValueError(
                f"input_scale {operand.static.scale} is too small for {operand.dtype}: its "
                "reciprocal is not finite. Serve the model with --dtype bfloat16."
            )
        exact = 1.0 / float(factor)
        scale = operand.codes.scales.flatten().double()
        # ModelSlim's deq_scale has the input's scale in it.
        scale *= exact if operand.quant_bias is None else exact / operand.static.scale
        self.packed = quantised_linear.pack_int8(operand.codes.codes, operand.device)
        for name, tensor, dtype in (
            ("scale", scale, torch.float32),
            ("factor", factor, operand.dtype),
            ("zero", zero, operand.dtype),
            ("quant_bias", _integer_bias(operand, exact / operand.static.scale), torch.int32),
        ):
            self.register_buffer(name, _moved(operand, tensor, dtype), persistent=False)

    def forward(self, x: torch.Tensor, add_bias: bool) -> torch.Tensor:
        """Quantise the input with the checkpoint's numbers, and multiply."""
        return quant_matmul(
            static_quant(x, self.factor, self.zero),
            self.packed,
            self.scale,
            quant_bias=self.quant_bias,
            bias=self._bias(add_bias),
            out_dtype=x.dtype,
        )


def _integer_bias(operand: Operand, gain: float) -> torch.Tensor | None:
    """Return what is added to the integer product: minus the zero point's part, and the bias.

    Args:
        operand: the weight, with its own ``quant_bias`` in units of the checkpoint's scale.
        gain: by how much the final scale differs from the checkpoint's.
    """
    assert operand.static is not None
    zero = operand.static.zero
    if operand.quant_bias is None and not zero:
        return None
    shift = operand.codes.codes.sum(1, dtype=torch.int64) * zero
    if operand.quant_bias is None:
        return -shift
    bias = operand.quant_bias.long() + shift
    return (bias.double() / gain).round().long() - shift


def _moved(
    operand: Operand, tensor: torch.Tensor | None, dtype: torch.dtype
) -> torch.Tensor | None:
    return None if tensor is None else tensor.to(dtype).to(operand.device)


class _Columns(LinearKernel):
    """A weight of more columns than an operator takes, in parts."""

    def __init__(self, make: Callable[[Operand], LinearKernel], operand: Operand) -> None:
        super().__init__(None)
        n = operand.codes.codes.shape[0]
        parts = [
            make(_rows(operand, first, min(_MOST_COLUMNS, n - first)))
            for first in range(0, n, _MOST_COLUMNS)
        ]
        self.parts = torch.nn.ModuleList(parts)

    def forward(self, x: torch.Tensor, add_bias: bool) -> torch.Tensor:
        """Multiply."""
        return torch.cat([part(x, add_bias) for part in self.parts], -1)


def _rows(operand: Operand, first: int, count: int) -> Operand:
    """Return output features ``first`` to ``first + count`` of a weight."""

    def some(tensor: torch.Tensor | None) -> torch.Tensor | None:
        return None if tensor is None else tensor.narrow(0, first, count)

    codes = operand.codes
    taken = replace(
        codes,
        codes=codes.codes.narrow(0, first, count),
        scales=codes.scales.narrow(0, first, count),
        zeros=some(codes.zeros),
    )
    return replace(
        operand, codes=taken, quant_bias=some(operand.quant_bias), bias=some(operand.bias)
    )


_KERNELS: dict[Kernel, Callable[[Operand], LinearKernel]] = {
    Kernel.NPU_WEIGHT_ONLY: WeightOnlyKernel,
    Kernel.NPU_INT8_DYNAMIC: DynamicInt8Kernel,
    Kernel.NPU_INT8_STATIC: StaticInt8Kernel,
}


def make_kernel(kernel: Kernel, operand: Operand) -> LinearKernel:
    """Make the kernel of a quantised weight.

    Args:
        kernel: which one.
        operand: the weight.
    """
    make = _KERNELS[kernel]
    if operand.codes.codes.shape[0] > _MOST_COLUMNS:
        return _Columns(make, operand)
    return make(operand)
