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

#: Products of runs take counts of two experts or more.
_FEWEST = 2


class AscendMoEMethod(UnquantizedFusedMoEMethod):
    """Experts in 16 bits, multiplied in runs of rows that share an expert.

    With expert parallelism the devices of a tensor parallel group have whole experts each and all
    tokens; vLLM adds up what they return.
    """

    def __init__(self, moe: FusedMoEConfig) -> None:
        """Check what the operators can serve.

        Raises:
            ConfigError: experts that they cannot serve.
        """
        reasons = why_not(moe, spread=True)
        if moe.moe_parallel_config.use_ep and moe.num_local_experts < _FEWEST:
            reasons.append(
                f"{moe.num_local_experts} expert per device (leave --enable-expert-parallel out)"
            )
        if reasons:
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
        spread = layer.expert_map
        layer.ascend_order = None if spread is None else order_of(spread)

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
        arguments = (
            x,
            layer.w13_weight,
            layer.w2_weight,
            topk_weights,
            topk_ids.to(torch.int32),
        )
        if layer.ascend_order is None:
            return operators.swiglu_experts(*arguments)
        return operators.swiglu_local_experts(*arguments, layer.ascend_order)


def order_of(expert_map: Tensor) -> Tensor:
    """Number all experts so that those of this device come first.

    Args:
        expert_map: int32 ``[experts]``: an expert's place on this device; -1: it is on another.

    Returns:
        int32 ``[experts]``, on the device of the map.
    """
    places = expert_map.cpu()
    order, elsewhere = places.clone(), places < 0
    local = len(places) - int(elsewhere.sum())
    order[elsewhere] = torch.arange(local, len(places), dtype=places.dtype)
    return order.to(torch.int32).to(expert_map.device)


_registered = False


def register_experts() -> None:
    """Replace vLLM's method in this process. Idempotent."""
    global _registered
    if _registered:
        return
    _registered = True
    UnquantizedFusedMoEMethod.register_oot(AscendMoEMethod)
