"""RMS norms of eager models on the CPU: vLLM's own C++ kernels, which vLLM leaves unused there.

vLLM 0.32 computes ``ir.ops.rms_norm`` on a CPU with seven torch operators and as many temporary
tensors (2.5 to 4 times slower for a decode step, more for a prefill chunk), although its CPU
library has a fused kernel, which is more accurate, too: it rounds once. The plugin registers that
kernel as an implementation of its own; compiled models keep the torch code, which Inductor fuses
with its neighbours.

The library's ``fused_add_rms_norm`` rounds the sum in bfloat16 before it takes the norm, and
SmolLM2 then answers wrongly (RMS error of the logprobs 0.092 instead of 0.075): the plugin has an
operator of its own. It also serves Gemma's norms, whose weights are float32. Source:
``vllm/kernels/vllm_c.py`` registers the same operators for GPUs.
"""

from __future__ import annotations

from torch import Tensor, empty, float32, ops
from vllm import ir

from ascend_plugin.ops.add_rms_norm import add_rms_norm
from ascend_plugin.ops.checks import FLOAT_DTYPES

PROVIDER = "ascend_cpu"


def _norm_supported(
    x: Tensor, weight: Tensor | None, epsilon: float, variance_size: int | None = None
) -> bool:
    return (
        variance_size is None
        and weight is not None
        and weight.dtype in (x.dtype, float32)
        and x.dtype in FLOAT_DTYPES
    )


def _add_norm_supported(
    x: Tensor,
    x_residual: Tensor,
    weight: Tensor | None,
    epsilon: float,
    variance_size: int | None = None,
) -> bool:
    plain = x.dim() == 2 and x.stride(1) == 1 and x_residual.stride(-1) == 1
    return (
        plain and x_residual.dtype == x.dtype and _norm_supported(x, weight, epsilon, variance_size)
    )


@ir.ops.rms_norm.register_impl(PROVIDER, supports_args=_norm_supported)
def rms_norm(
    x: Tensor, weight: Tensor | None, epsilon: float, variance_size: int | None = None
) -> Tensor:
    """Return ``x / rms(x) * weight`` over the last dimension, in the shape and dtype of ``x``."""
    assert weight is not None
    # The kernels ignore strides, and heads cut out of a fused projection have some.
    x = x.contiguous()
    if weight.dtype != x.dtype:
        return add_rms_norm(x.view(-1, x.shape[-1]), None, weight, epsilon).view(x.shape)
    out = empty(x.shape, dtype=x.dtype, device=x.device)
    ops._C.rms_norm(out, x, weight, epsilon)
    return out


@ir.ops.fused_add_rms_norm.register_impl(PROVIDER, supports_args=_add_norm_supported, inplace=True)
def fused_add_rms_norm(
    x: Tensor,
    x_residual: Tensor,
    weight: Tensor | None,
    epsilon: float,
    variance_size: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Return the norm of ``x + x_residual``, and the sum in the place of ``x_residual``."""
    assert weight is not None
    return add_rms_norm(x, x_residual, weight, epsilon), x_residual
