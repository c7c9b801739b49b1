"""RMS norms of eager models on the CPU: vLLM's own C++ kernels, which vLLM leaves unused there.

vLLM 0.32 computes ``ir.ops.rms_norm`` on a CPU with seven torch operators and as many temporary
tensors (2.5 to 4 times slower for a decode step, more for a prefill chunk), although its CPU
library has a fused kernel, which is more accurate, too: it rounds once. The plugin registers that
kernel as an implementation of its own; compiled models keep the torch code, which Inductor fuses
with its neighbours.

The library's ``fused_add_rms_norm`` is left alone: in bfloat16 it rounds the sum before it takes
the norm, and SmolLM2 then answers wrongly (RMS error of the logprobs 0.092 instead of 0.075).
Source: ``vllm/kernels/vllm_c.py`` registers the same operator for GPUs.
"""

from __future__ import annotations

from torch import Tensor, empty, ops
from vllm import ir

PROVIDER = "ascend_cpu"


def _norm_supported(
    x: Tensor, weight: Tensor | None, epsilon: float, variance_size: int | None = None
) -> bool:
    return variance_size is None and weight is not None and weight.dtype == x.dtype


@ir.ops.rms_norm.register_impl(PROVIDER, supports_args=_norm_supported)
def rms_norm(
    x: Tensor, weight: Tensor | None, epsilon: float, variance_size: int | None = None
) -> Tensor:
    """Return ``x / rms(x) * weight`` over the last dimension, in the shape and dtype of ``x``."""
    # The kernel ignores strides, and heads cut out of a fused projection have some.
    x = x.contiguous()
    out = empty(x.shape, dtype=x.dtype, device=x.device)
    ops._C.rms_norm(out, x, weight, epsilon)
    return out
