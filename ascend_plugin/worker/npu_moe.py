"""Mixture of experts on an NPU: vLLM's method for it is empty on platforms out of its tree."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from vllm.model_executor.layers.fused_moe.config import FusedMoEConfig
from vllm.model_executor.layers.fused_moe.unquantized_fused_moe_method import (
    UnquantizedFusedMoEMethod,
)

from ascend_plugin.config import ConfigError
from ascend_plugin.ops.npu import experts as operators
from ascend_plugin.quantization.experts import why_not


class AscendMoEMethod(UnquantizedFusedMoEMethod):
    """Experts in 16 bits, multiplied in runs of rows that share an expert."""

    def __init__(self, moe: FusedMoEConfig) -> None:
        """Check what the operators can serve.

        Raises:
            ConfigError: experts that they cannot serve.
        """
        if reasons := why_not(moe):
            raise ConfigError(
                f"this mixture of experts is not served on an NPU: {', '.join(reasons)}. Set "
                "ASCEND_PLUGIN_DEVICE=cpu to serve on the CPU."
            )
        super().__init__(moe)

    @property
    def is_monolithic(self) -> bool:
        """Experts are chosen by vLLM's router, and come as arguments."""
        return False

    def process_weights_after_loading(self, layer: Any) -> None:
        """Turn the weights once: the products want the inner dimension first."""
        super().process_weights_after_loading(layer)
        for weight in (layer.w13_weight, layer.w2_weight):
            weight.data = weight.data.transpose(1, 2).contiguous()

    def apply(
        self,
        layer: Any,
        x: Tensor,
        topk_weights: Tensor,
        topk_ids: Tensor,
        shared_experts: Any,
        shared_experts_input: Tensor | None,
    ) -> Tensor:
        """Return the sum of each token's experts; arguments as in ``FusedMoEMethodBase``."""
        if layer.apply_router_weight_on_input:
            # Defined for one expert per token.
            x = x * topk_weights.to(x.dtype)
            topk_weights = torch.ones_like(topk_weights)
        ids = topk_ids.to(torch.int32)
        return operators.swiglu_experts(x, layer.w13_weight, layer.w2_weight, topk_weights, ids)


_registered = False


def register_experts() -> None:
    """Replace vLLM's method in this process. Idempotent."""
    global _registered
    if _registered:
        return
    _registered = True
    UnquantizedFusedMoEMethod.register_oot(AscendMoEMethod)
