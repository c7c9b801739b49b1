"""How a module of a scheme runs on a device: decided here, logged and shown by ``inspect``."""

from __future__ import annotations

import re
from dataclasses import dataclass
from enum import StrEnum

import torch

from ascend_plugin.ops import native, npu_weights
from ascend_plugin.ops.dispatch import Support
from ascend_plugin.ops.npu_weights import ExpertsRequest
from ascend_plugin.ops.quant_matmul import MAX_K, Int8Request
from ascend_plugin.ops.weight_quant_matmul import LinearRequest

from .scheme import ModuleScheme, Scheme
from .target import Target

_EXPERT = re.compile(r"\.experts\.\d+\.")

#: The NPU's operators answer alike for both types that it computes in.
_NPU_DTYPE = torch.bfloat16


class Kernel(StrEnum):
    """What multiplies."""

    FLOAT = "vLLM's float GEMM"
    WEIGHT_ONLY = "weight_quant_matmul"
    INT8_STATIC = "static_quant, quant_matmul"
    INT8_DYNAMIC = "dynamic_quant, quant_matmul"
    INT8_ONEDNN = "vLLM's oneDNN int8"
    NPU_FLOAT = "aclnn matmul"
    NPU_WEIGHT_ONLY = "npu_weight_quant_batchmatmul"
    NPU_INT8_STATIC = "npu_quantize, npu_quant_matmul"
    NPU_INT8_DYNAMIC = "npu_dynamic_quant, npu_quant_matmul"
    NPU_EXPERTS_FLOAT = "npu_grouped_matmul"
    NPU_EXPERTS_WEIGHT_ONLY = "npu_grouped_matmul, antiquant"
    NPU_EXPERTS_INT8 = "npu_dynamic_quant, npu_grouped_matmul"
    NONE = "none"


@dataclass(frozen=True, slots=True)
class Plan:
    """How one module runs.

    Attributes:
        kernel: what multiplies.
        runs_as: the scheme that results, for example ``W4A16``.
        note: why it differs from the checkpoint's scheme, or why it is refused; empty: it does not.
    """

    kernel: Kernel
    runs_as: str
    note: str = ""

    @property
    def refused(self) -> bool:
        """Whether the device does not serve the module."""
        return self.kernel is Kernel.NONE


def is_expert(module: ModuleScheme) -> bool:
    """Say whether a module is part of one expert of a mixture."""
    return _EXPERT.search(module.name) is not None


def plan(module: ModuleScheme, target: Target = Target.CPU) -> Plan:
    """Say how a module runs.

    Args:
        module: of a checkpoint.
        target: on which device.
    """
    if target is Target.CPU:
        return _on_a_cpu(module)
    if is_expert(module):
        return _experts_on_an_npu(module)
    return _on_an_npu(module)


def _on_a_cpu(module: ModuleScheme) -> Plan:
    if module.scheme is Scheme.FLOAT:
        return Plan(Kernel.FLOAT, "FLOAT")
    if module.scheme in (Scheme.W4A16, Scheme.W8A16):
        return Plan(Kernel.WEIGHT_ONLY, module.scheme.value)
    if module.scheme is Scheme.W4A8:
        return Plan(
            Kernel.WEIGHT_ONLY,
            "W4A16",
            "inputs stay 16-bit: a CPU gains nothing from quantising them beside 4-bit weights",
        )
    if note := _keeps_inputs(module):
        return Plan(Kernel.WEIGHT_ONLY, "W8A16", note)
    static = module.scheme is Scheme.W8A8
    kernel = Kernel.INT8_STATIC if static else Kernel.INT8_DYNAMIC
    ours = _has_the_best_int8_product() and module.k <= MAX_K
    # Its numbers fit the plugin's product alone: oneDNN adds no integers.
    if not ours and not module.integer_bias:
        kernel = Kernel.INT8_ONEDNN
    return Plan(kernel, module.scheme.value)


def _has_the_best_int8_product() -> bool:
    """Say whether the plugin's kernels multiply int8 as fast as oneDNN on this processor.

    They know no AMX, which is several times faster in prefill, and the portable ones no
    instructions of the processor.
    """
    if torch.cpu._is_amx_tile_supported() or not native.support().ok:
        return False
    return native.load().isa != "portable"


def _keeps_inputs(module: ModuleScheme) -> str:
    """Return why the inputs of 8-bit weights stay 16-bit on every device; empty: they do not."""
    if module.group == module.k and module.symmetric:
        return ""
    what = "groups" if module.group != module.k else "zero points"
    return f"inputs stay 16-bit: 8-bit weights with {what}"


def _on_an_npu(module: ModuleScheme) -> Plan:
    if module.scheme is Scheme.FLOAT:
        return Plan(Kernel.NPU_FLOAT, "FLOAT")
    runs_as, note = _npu_scheme(module)
    if runs_as in (Scheme.W8A8, Scheme.W8A8_DYNAMIC):
        # Columns beyond the limit are multiplied apart, so the number of them is no obstacle.
        n = min(module.n, npu_weights.MAX_FEATURES)
        support = npu_weights.quant_matmul(Int8Request(_NPU_DTYPE, n, module.k))
        static = runs_as is Scheme.W8A8
        kernel = Kernel.NPU_INT8_STATIC if static else Kernel.NPU_INT8_DYNAMIC
        return _supported(kernel, runs_as, note, support)
    n = min(module.n, npu_weights.MAX_FEATURES // 8 * 8)
    request = LinearRequest(
        _NPU_DTYPE, _NPU_DTYPE, n, module.k, module.group, module.bits, not module.symmetric
    )
    support = npu_weights.weight_quant_matmul(request)
    return _supported(Kernel.NPU_WEIGHT_ONLY, runs_as, note, support)


def _npu_scheme(module: ModuleScheme) -> tuple[Scheme, str]:
    """Return what a module runs as, and why it is not what the checkpoint says."""
    if module.scheme in (Scheme.W4A16, Scheme.W8A16):
        return module.scheme, ""
    if module.scheme is Scheme.W4A8:
        return (
            Scheme.W4A16,
            "inputs stay 16-bit: the NPU multiplies int8 by int4 in groups of 256 alone",
        )
    if note := _keeps_inputs(module):
        return Scheme.W8A16, note
    if module.scheme is Scheme.W8A8_DYNAMIC and module.input and not module.input.symmetric:
        return (
            Scheme.W8A16,
            "inputs stay 16-bit: the NPU's product knows no zero points of tokens",
        )
    return module.scheme, ""


def _experts_on_an_npu(module: ModuleScheme) -> Plan:
    if module.scheme is Scheme.FLOAT:
        return Plan(Kernel.NPU_EXPERTS_FLOAT, "FLOAT")
    if module.activation_order:
        return _refused("groups in the order of activations (desc_act) of experts")
    if module.rotations:
        return _refused("rotations of experts at run time")
    runs_as, note = _npu_scheme(module)
    if runs_as is Scheme.W8A8:
        return _refused("static scales of the inputs of experts; quantise them per token")
    int8_input = runs_as is Scheme.W8A8_DYNAMIC
    # How many experts there are is the layer's to know.
    request = ExpertsRequest(
        _NPU_DTYPE,
        2,
        module.n,
        module.k,
        module.group,
        module.bits,
        int8_input,
        not module.symmetric,
    )
    kernel = Kernel.NPU_EXPERTS_INT8 if int8_input else Kernel.NPU_EXPERTS_WEIGHT_ONLY
    return _supported(kernel, runs_as, note, npu_weights.experts(request))


def _supported(kernel: Kernel, runs_as: Scheme, note: str, support: Support) -> Plan:
    return Plan(kernel, runs_as.value, note) if support.ok else _refused(support.reason)


def _refused(reason: str) -> Plan:
    return Plan(Kernel.NONE, "–", f"not served on an NPU: {reason}")
