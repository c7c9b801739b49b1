"""Gemma's norms with the factors that they compute anew in every call."""

from __future__ import annotations

from typing import Any

import torch


def fold_norms(model: torch.nn.Module) -> int:
    """Let the norms of Gemma-like models keep ``1 + weight`` in float32.

    vLLM's ``GemmaRMSNorm`` adds the one in each call, which takes longer than the norm of a decode
    step and cannot be recorded. What is computed is the same. Call it again when weights changed.

    Returns:
        How many norms there are.
    """
    from vllm.model_executor.layers.layernorm import GemmaRMSNorm

    norms: list[Any] = [module for module in model.modules() if type(module) is GemmaRMSNorm]
    for norm in norms:
        norm._forward_method = _FoldedNorm(norm)
    return len(norms)


class _FoldedNorm:
    """Stands in for the ``forward_native`` of one norm."""

    def __init__(self, norm: Any) -> None:
        self._weight = norm.weight.detach().float() + 1.0
        self._epsilon = norm.variance_epsilon

    def __call__(
        self, x: torch.Tensor, residual: torch.Tensor | None = None
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        from vllm import ir

        if residual is None:
            return ir.ops.rms_norm(x, self._weight, self._epsilon)
        return ir.ops.fused_add_rms_norm(x, residual, self._weight, self._epsilon)
