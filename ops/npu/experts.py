"""Mixture of experts: choice of experts, and their products, with shapes that no token decides."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch_npu

from .elementwise import swiglu

#: ``expert_tokens_num_type`` and ``group_list_type``: how many rows each expert gets.
COUNTS = 1


def choose_softmax(
    logits: torch.Tensor, top_k: int, renormalise: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Choose the most probable experts of each token.

    Args:
        logits: ``[tokens, experts]``, any float.
        top_k: experts of a token.
        renormalise: whether a token's weights shall add up to one.

    Returns:
        Weights, float32 ``[tokens, top_k]``, and experts, int32 of the same shape.
    """
    weights, experts, _ = torch_npu.npu_moe_gating_top_k_softmax(logits.float(), k=top_k)
    return _renormalised(weights, renormalise), experts


def choose_sigmoid(
    logits: torch.Tensor, top_k: int, renormalise: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Choose the experts with the largest sigmoid; arguments as in :func:`choose_softmax`."""
    weights, experts = logits.float().sigmoid().topk(top_k, -1)
    return _renormalised(weights, renormalise), experts.to(torch.int32)


@dataclass(frozen=True, slots=True)
class Grouping:
    """How a token's experts are chosen from groups (DeepSeek-V2, -V3).

    Attributes:
        top_k: experts of a token.
        groups: equal parts of the experts; 1: there are none.
        kept: groups of which a token's experts may be.
        sigmoid: whether scores are sigmoids, else a softmax over all experts.
        renormalise: whether a token's weights shall add up to one.
        scale: factor of the weights.
    """

    top_k: int
    groups: int = 1
    kept: int = 1
    sigmoid: bool = False
    renormalise: bool = False
    scale: float = 1.0


#: What ``npu_moe_gating_top_k`` takes: experts, padded to whole runs of 32 in every group; and more
#: than two experts in a group.
_MAX_EXPERTS, _RUN, _MIN_GROUP = 2048, 32, 3


def choose_grouped(
    logits: torch.Tensor, bias: torch.Tensor | None, how: Grouping
) -> tuple[torch.Tensor, torch.Tensor]:
    """Choose experts of the groups with the best scores; the bias counts in the choice alone.

    A group's score is its best expert's, or with a bias the sum of its two best
    (arXiv:2412.19437, section 2.1.2).

    Args:
        logits: ``[tokens, experts]``, any float.
        bias: ``[experts]``, added to the scores of experts for the choice.
        how: sizes and kinds.

    Returns:
        Weights, float32 ``[tokens, top_k]``, and experts, int32 of the same shape.
    """
    logits = logits.float()
    bias = None if bias is None else bias.float()
    if not _fused(logits.shape[-1], how):
        return _choose_by_parts(logits, bias, how)
    # The operator renormalises sigmoids, always, and a softmax never.
    scale = how.scale if how.sigmoid or not how.renormalise else 1.0
    weights, experts, _ = torch_npu.npu_moe_gating_top_k(
        logits,
        how.top_k,
        bias=bias,
        k_group=how.kept,
        group_count=how.groups,
        group_select_mode=0 if bias is None else 1,
        norm_type=int(how.sigmoid),
        routed_scaling_factor=scale,
    )
    if how.renormalise and not how.sigmoid:
        weights = _renormalised(weights, True) * how.scale
    return weights, experts


def _fused(experts: int, how: Grouping) -> bool:
    """Say whether one operator makes the choice."""
    group = experts // how.groups
    padded = -(-group // _RUN) * _RUN * how.groups
    fits = group >= _MIN_GROUP and padded <= _MAX_EXPERTS
    return fits and (how.renormalise or not how.sigmoid)


def _choose_by_parts(
    logits: torch.Tensor, bias: torch.Tensor | None, how: Grouping
) -> tuple[torch.Tensor, torch.Tensor]:
    """Choose with plain operators what :func:`choose_grouped` says."""
    scores = logits.sigmoid() if how.sigmoid else logits.softmax(-1)
    wanted = scores if bias is None else scores + bias
    if how.groups > 1:
        grouped = wanted.view(wanted.shape[0], how.groups, -1)
        best = grouped.topk(1 if bias is None else min(2, grouped.shape[-1]), -1)[0].sum(-1)
        kept = torch.zeros_like(best).scatter(1, best.topk(how.kept, -1)[1], 1.0)
        wanted = grouped.masked_fill(kept[..., None] == 0, -torch.inf).view(wanted.shape)
    experts = wanted.topk(how.top_k, -1)[1]
    weights = _renormalised(scores.gather(1, experts), how.renormalise)
    return weights * how.scale, experts.to(torch.int32)


def _renormalised(weights: torch.Tensor, renormalise: bool) -> torch.Tensor:
    return weights / weights.sum(-1, keepdim=True) if renormalise else weights


def swiglu_experts(
    x: torch.Tensor,
    gate_up: torch.Tensor,
    down: torch.Tensor,
    weights: torch.Tensor,
    experts: torch.Tensor,
) -> torch.Tensor:
    """Return the weighted sum of each token's experts, ``down(silu(gate(x)) * up(x))``.

    Six launches, whatever the number of experts: rows are sorted by expert, multiplied in runs,
    and brought back. How many rows an expert gets stays on the device.

    Args:
        x: ``[tokens, hidden]``, bfloat16 or float16.
        gate_up: ``[experts, hidden, 2 * intermediate]``, gate first, the dtype of ``x``.
        down: ``[experts, intermediate, hidden]``, the dtype of ``x``.
        weights: float32 ``[tokens, top_k]``.
        experts: int32 ``[tokens, top_k]``.

    Returns:
        ``[tokens, hidden]``, the dtype of ``x``.
    """
    outer, places, _ = _run(x, gate_up, down, experts, gate_up.shape[0])
    out: torch.Tensor = torch_npu.npu_moe_token_unpermute(outer, places, weights.to(x.dtype))
    return out


def swiglu_local_experts(
    x: torch.Tensor,
    gate_up: torch.Tensor,
    down: torch.Tensor,
    weights: torch.Tensor,
    experts: torch.Tensor,
    order: torch.Tensor,
) -> torch.Tensor:
    """Return this device's part of :func:`swiglu_experts`; the sum over devices is the whole.

    Rows are sorted so that those of other devices' experts come last. They are not multiplied: the
    products leave them as memory was, so they are cleared before they are brought back.

    Args:
        x: ``[tokens, hidden]``, bfloat16 or float16; every device has all tokens.
        gate_up: ``[local experts, hidden, 2 * intermediate]``; two experts or more.
        down: ``[local experts, intermediate, hidden]``.
        weights: float32 ``[tokens, top_k]``.
        experts: int32 ``[tokens, top_k]``, among all experts.
        order: int32 ``[experts]``: places of this device's experts in ``gate_up``; then, in any
            order, numbers of the others.

    Returns:
        ``[tokens, hidden]``, the dtype of ``x``.
    """
    local = gate_up.shape[0]
    sorted_as = order.index_select(0, experts.reshape(-1)).view_as(experts)
    outer, places, counts = _run(x, gate_up, down, sorted_as, order.numel())
    row = torch.arange(outer.shape[0], device=outer.device)
    outer.masked_fill_((row >= counts[:local].sum())[:, None], 0.0)
    out: torch.Tensor = torch_npu.npu_moe_token_unpermute(outer, places, weights.to(x.dtype))
    return out


def _run(
    x: torch.Tensor, gate_up: torch.Tensor, down: torch.Tensor, experts: torch.Tensor, count: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Sort rows by expert, and multiply those of the first experts, of which there are weights.

    Args:
        x: ``[tokens, hidden]``.
        gate_up, down: as in :func:`swiglu_experts`.
        experts: int32 ``[tokens, top_k]``, below ``count``.
        count: of experts.

    Returns:
        Rows ``[tokens * top_k, hidden]`` by expert, the place of each (token, choice) among them,
        and how many each expert has, int64 ``[count]``.
    """
    rows, places, counts, _ = torch_npu.npu_moe_init_routing_v2(
        x,
        experts,
        active_num=experts.numel(),
        expert_num=count,
        expert_tokens_num_type=COUNTS,
        expert_tokens_num_flag=True,
        active_expert_range=[0, count],
        quant_mode=-1,
        row_idx_type=0,
    )
    served = counts[: gate_up.shape[0]]
    inner = swiglu(_by_expert(rows, gate_up, served))
    return _by_expert(inner, down, served), places, counts


def _by_expert(rows: torch.Tensor, weight: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
    out: torch.Tensor = torch_npu.npu_grouped_matmul(
        [rows],
        [weight],
        group_list=counts,
        split_item=3,
        group_type=0,
        group_list_type=COUNTS,
    )[0]
    return out
