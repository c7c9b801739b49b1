"""The kernels of quantised linear layers: those of CPUs, and the choice between devices.

Each is made once from unpacked weights, keeps them in its kernel's own order and nothing else.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from ascend_plugin.ops.dynamic_quant import dynamic_quant
from ascend_plugin.ops.quant_matmul import pack_int8, quant_matmul
from ascend_plugin.ops.static_quant import static_quant
from ascend_plugin.ops.weight_quant_matmul import pack, weight_quant_matmul

from .plan import Kernel
from .scheme import InputScheme
from .unpack import Codes, StaticInput


@dataclass(frozen=True, slots=True, eq=False)
class Operand:
    """What a kernel is made from: this process' part of one or several modules, joined along n.

    Attributes:
        codes: unpacked weight ``[n, k]``.
        bits: of a code.
        group: input features that share a scale, at most k.
        input: how the input is quantised; None: it is not.
        static: the numbers for that, if the checkpoint holds them.
        quant_bias: int32 ``[n]`` added to the integer product.
        bias: ``[n]`` in the model's type.
        dtype: of the model.
        device: where the weight will lie.
    """

    codes: Codes
    bits: int
    group: int
    input: InputScheme | None
    static: StaticInput | None
    quant_bias: torch.Tensor | None
    bias: torch.Tensor | None
    dtype: torch.dtype
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))


class LinearKernel(torch.nn.Module):
    """Multiplies inputs with one weight.

    ``forward(x [tokens, k], add_bias) -> [tokens, n]``, both in the model's type.
    """

    def __init__(self, bias: torch.Tensor | None) -> None:
        super().__init__()
        self.bias: torch.Tensor | None
        self.register_buffer("bias", bias, persistent=False)

    def _bias(self, add_bias: bool) -> torch.Tensor | None:
        return self.bias if add_bias else None


class FloatKernel(LinearKernel):
    """vLLM's float GEMM, for float parts of a module whose others are quantised."""

    cpu_linear: Callable[..., torch.Tensor]

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
        """Pack a weight ``[n, k]`` as vLLM does."""
        from vllm.model_executor.layers.utils import dispatch_cpu_unquantized_gemm

        super().__init__(None)
        # Under the names that vLLM looks for; it may pack both.
        del self.bias
        self.weight = torch.nn.Parameter(weight, requires_grad=False)
        self.bias = None if bias is None else torch.nn.Parameter(bias, requires_grad=False)
        dispatch_cpu_unquantized_gemm(self, remove_weight=True)

    def forward(self, x: torch.Tensor, add_bias: bool) -> torch.Tensor:
        """Multiply."""
        return self.cpu_linear(x, self.weight, self.bias if add_bias else None)


class WeightOnlyKernel(LinearKernel):
    """The plugin's ``weight_quant_matmul``: inputs stay as they are."""

    def __init__(self, operand: Operand) -> None:
        """Repack the codes."""
        super().__init__(operand.bias)
        codes = operand.codes
        self.packed = pack(
            codes.codes, codes.scales, codes.zeros, bits=operand.bits, group=operand.group
        )

    def forward(self, x: torch.Tensor, add_bias: bool) -> torch.Tensor:
        """Multiply."""
        out: torch.Tensor = weight_quant_matmul(x, self.packed, self._bias(add_bias))
        return out


class Int8Kernel(LinearKernel):
    """Int8 codes in the order of the plugin's ``quant_matmul``: exact in int32 up to the scale."""

    def __init__(self, operand: Operand) -> None:
        """Repack the codes."""
        super().__init__(operand.bias)
        self.scale: torch.Tensor
        self.packed = pack_int8(operand.codes.codes)
        scale = operand.codes.scales.flatten().float()
        self.register_buffer("scale", scale, persistent=False)


class DynamicInt8Kernel(Int8Kernel):
    """The plugin's ``dynamic_quant``, then ``quant_matmul``."""

    def __init__(self, operand: Operand) -> None:
        """Repack the codes."""
        super().__init__(operand)
        assert operand.input is not None
        self.symmetric = operand.input.symmetric

    def forward(self, x: torch.Tensor, add_bias: bool) -> torch.Tensor:
        """Quantise each token by its own range, and multiply."""
        rows = dynamic_quant(x, self.symmetric)
        return quant_matmul(
            rows.codes,
            self.packed,
            self.scale,
            rows.scales,
            x_zero=rows.zeros,
            bias=self._bias(add_bias),
            out_dtype=x.dtype,
        )


class StaticInt8Kernel(Int8Kernel):
    """The plugin's ``static_quant``, then ``quant_matmul``."""

    def __init__(self, operand: Operand) -> None:
        """Repack the codes; ``operand.static`` must be given."""
        super().__init__(operand)
        static = operand.static
        assert static is not None
        self.factor: torch.Tensor
        self.zero: torch.Tensor
        self.x_scale: torch.Tensor | None
        self.x_zero: torch.Tensor | None
        self.quant_bias: torch.Tensor | None
        factor, zero = input_numbers(static, torch.float32)
        x_scale = x_zero = None
        # ModelSlim's deq_scale has the input's scale in it, its quant_bias the zero point.
        if operand.quant_bias is None:
            x_scale = torch.tensor([static.scale], dtype=torch.float32)
            x_zero = torch.tensor([static.zero], dtype=torch.int32) if static.zero else None
        for name, tensor in (
            ("factor", factor),
            ("zero", zero),
            ("x_scale", x_scale),
            ("x_zero", x_zero),
            ("quant_bias", operand.quant_bias),
        ):
            self.register_buffer(name, tensor, persistent=False)

    def forward(self, x: torch.Tensor, add_bias: bool) -> torch.Tensor:
        """Quantise the input with the checkpoint's numbers, and multiply."""
        return quant_matmul(
            static_quant(x, self.factor, self.zero),
            self.packed,
            self.scale,
            self.x_scale,
            x_zero=self.x_zero,
            quant_bias=self.quant_bias,
            bias=self._bias(add_bias),
            out_dtype=x.dtype,
        )


def input_numbers(static: StaticInput, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Return factor and zero of ``static_quant`` for the checkpoint's numbers."""
    factor = torch.tensor([1.0 / static.scale], dtype=torch.float64).to(dtype)
    return factor, torch.tensor([static.zero], dtype=dtype)


class OneDnnInt8Kernel(LinearKernel):
    """vLLM's int8 product with oneDNN, for processors whose best instructions the plugin lacks."""

    def __init__(self, operand: Operand) -> None:
        """Let oneDNN pack the codes."""
        from vllm import _custom_ops as vllm_ops

        super().__init__(operand.bias)
        assert operand.input is not None
        self.symmetric = operand.input.symmetric
        static, codes = operand.static, operand.codes
        scale = codes.scales.flatten().float()
        input_scale = input_zero = adjustment = None
        if static is not None:
            input_scale = torch.tensor([static.scale], dtype=torch.float32)
            if not self.symmetric:
                input_zero = torch.tensor([static.zero], dtype=torch.int32)
        if not (self.symmetric and static is not None):
            # What a zero point of the input adds to the product, per output feature.
            sums = codes.codes.sum(1, dtype=torch.int64).to(torch.float32)
            adjustment = (sums * scale)[None]
        self.register_buffer("input_scale", input_scale, persistent=False)
        self.register_buffer("input_zero", input_zero, persistent=False)
        self.register_buffer("adjustment", adjustment, persistent=False)
        # oneDNN's handle points to the scales and does not own them.
        self.register_buffer("scale", scale, persistent=False)
        self.handler = vllm_ops.create_onednn_scaled_mm(
            codes.codes.t(), scale, operand.dtype, static is None, not self.symmetric, 32
        )

    def forward(self, x: torch.Tensor, add_bias: bool) -> torch.Tensor:
        """Quantise the input, and multiply."""
        from vllm import _custom_ops as vllm_ops

        codes, scale, zero = vllm_ops.onednn_scaled_int8_quant(
            x, self.input_scale, self.input_zero, self.symmetric
        )
        out = torch.empty((x.shape[0], self.handler.n), dtype=x.dtype)
        vllm_ops.onednn_scaled_mm(
            self.handler, codes, out, scale, zero, self.adjustment, self._bias(add_bias)
        )
        return out


_KERNELS: dict[Kernel, Callable[[Operand], LinearKernel]] = {
    Kernel.WEIGHT_ONLY: WeightOnlyKernel,
    Kernel.INT8_STATIC: StaticInt8Kernel,
    Kernel.INT8_DYNAMIC: DynamicInt8Kernel,
    Kernel.INT8_ONEDNN: OneDnnInt8Kernel,
}


def make_kernel(kernel: Kernel, operand: Operand) -> LinearKernel:
    """Make the kernel of a quantised weight.

    Args:
        kernel: which one.
        operand: the weight.
    """
    if kernel in _KERNELS:
        return _KERNELS[kernel](operand)
    # Late: this imports torch_npu.
    from . import execute_npu

    return execute_npu.make_kernel(kernel, operand)


def make_float_kernel(
    weight: torch.Tensor, bias: torch.Tensor | None, device: torch.device
) -> LinearKernel:
    """Make the kernel of a float part of a layer.

    Args:
        weight: ``[n, k]`` in the model's type.
        bias: ``[n]`` or None.
        device: where the weight will lie.
    """
    if device.type == "cpu":
        return FloatKernel(weight, bias)
    from . import execute_npu

    return execute_npu.FloatKernel(weight, bias, device)
