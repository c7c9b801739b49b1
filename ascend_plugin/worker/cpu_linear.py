"""vLLM's layers without quantisation on the plugin's operator, with one copy of their weights."""

from __future__ import annotations

from typing import Any

import torch

from ascend_plugin.ops.checks import FLOAT_DTYPES, rows_contiguous
from ascend_plugin.ops.dense_matmul import dense_matmul


def serve_layer(layer: Any) -> bool:
    """Let a layer that is loaded multiply by its weights as they lie; say whether it does.

    Layers of other weights than float matrices (with a bias of another type, too), and those of
    models that are compiled, are left as they are.

    Args:
        layer: has ``weight`` ``[n, k]``, which stays; ``cpu_linear`` is set to a function of
            ``x`` ``[..., k]``, weight and bias.
    """
    from vllm.config import CompilationMode, get_current_vllm_config_or_none

    config = get_current_vllm_config_or_none()
    if config is not None and config.compilation_config.mode != CompilationMode.NONE:
        return False
    weight, bias = layer.weight, getattr(layer, "bias", None)
    if weight.is_meta or weight.dim() != 2 or weight.dtype not in FLOAT_DTYPES or 0 in weight.shape:
        return False
    if isinstance(bias, torch.Tensor) and bias.dtype != weight.dtype:
        return False
    if not rows_contiguous(weight):
        weight.data = weight.data.contiguous()
    layer.cpu_linear = multiply
    return True


def multiply(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None
) -> torch.Tensor:
    """Return ``x @ weight.T + bias`` of ``x`` ``[..., k]``, as ``torch.nn.functional.linear``."""
    if x.dim() == 2 and rows_contiguous(x):
        return dense_matmul(x, weight, bias)
    rows = x.reshape(-1, x.shape[-1])
    out = dense_matmul(rows if rows_contiguous(rows) else rows.contiguous(), weight, bias)
    return out.view(*x.shape[:-1], weight.shape[0])
