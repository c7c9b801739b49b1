"""Mixture of experts: gating, routing of rows to experts and back."""

from __future__ import annotations

import torch

from ..table import operator, write
from .moe_checks import check_gating, check_grouped_gating, check_routing, check_unpermute

#: What aclnnMoeInitRoutingV3 reports about experts, and how it quantises.
_TOKENS_COUNTED = 1
_UNQUANTISED = -1


@operator("aclnnMoeGatingTopKSoftmax", "TTiTTT", check=check_gating)
def _gate(
    logits: torch.Tensor,
    finished: torch.Tensor | None,
    k: int,
    weights: torch.Tensor,
    experts: torch.Tensor,
    rows: torch.Tensor,
) -> None:
    """Choose the ``k`` most probable experts of each row of ``[tokens, experts]``."""
    if finished is not None and finished.numel():
        raise NotImplementedError("finished rows are not simulated")
    values, indices = logits.float().softmax(-1).topk(k, -1)
    write(weights, values)
    write(experts, indices)
    tokens = logits.shape[0]
    # Row numbers of the expanded batch, choice by choice.
    write(rows, torch.arange(tokens * k).view(k, tokens).t())


@operator("aclnnMoeGatingTopK", "TTiiiiiibddTTT", check=check_grouped_gating)
def _gate_groups(
    logits: torch.Tensor,
    bias: torch.Tensor | None,
    k: int,
    kept: int,
    groups: int,
    group_mode: int,
    _renorm: int,
    norm: int,
    wants_norm: bool,
    factor: float,
    epsilon: float,
    weights: torch.Tensor,
    experts: torch.Tensor,
    normed: torch.Tensor,
) -> None:
    """Choose ``k`` experts of each row from the best groups; ties go to the first."""
    scores = logits.float().sigmoid() if norm else logits.float().softmax(-1)
    wanted = scores if bias is None else scores + bias.float()
    if groups > 1:
        parts = wanted.unflatten(-1, (groups, -1))
        best = parts.amax(-1) if group_mode == 0 else parts.topk(2, -1).values.sum(-1)
        chosen = (-best).argsort(dim=-1, stable=True)[:, :kept]
        dropped = torch.ones_like(best, dtype=torch.bool).scatter_(1, chosen, False)
        wanted = parts.masked_fill(dropped[..., None], -torch.inf).flatten(1)
    indices = (-wanted).argsort(dim=-1, stable=True)[:, :k]
    values = scores.gather(1, indices)
    if norm:
        values = values / (values.sum(-1, keepdim=True) + epsilon)
    write(weights, values * factor)
    write(experts, indices)
    if wants_norm:
        write(normed, scores)


def _route(experts: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Sort (token, choice) pairs by expert; return the order, and each pair's place in it."""
    order = experts.reshape(-1).argsort(stable=True)
    places = torch.empty_like(order)
    places[order] = torch.arange(order.numel())
    return order, places


@operator("aclnnMoeInitRoutingV3", "TTTTiiiiibiAiTTTT", check=check_routing)
def _init_routing(
    x: torch.Tensor,
    experts: torch.Tensor,
    scale: torch.Tensor | None,
    _offset: torch.Tensor | None,
    active: int,
    _capacity: int,
    expert_count: int,
    drop: int,
    tokens_type: int,
    _tokens_flag: bool,
    quant_mode: int,
    expert_range: list[int] | None,
    row_type: int,
    expanded: torch.Tensor,
    row_index: torch.Tensor,
    tokens: torch.Tensor,
    expanded_scale: torch.Tensor,
) -> None:
    """Copy rows of ``[tokens, hidden]`` to their experts, ordered by expert."""
    whole = not expert_range or expert_range == [0, expert_count]
    dropless = drop == 0 and active in (-1, 0, experts.numel())
    if quant_mode != _UNQUANTISED or not whole or not dropless or row_type not in (0, 1):
        raise NotImplementedError(
            f"quant_mode {quant_mode}, active_expert_range {expert_range}, drop_pad_mode {drop}, "
            f"active_num {active} and row_idx_type {row_type} are not simulated together; only "
            "routing of every row without quantisation is"
        )
    order, places = _route(experts)
    source = order // experts.shape[1]
    write(expanded, x[source])
    write(row_index, places if row_type == 0 else order)
    if scale is not None and scale.numel():
        write(expanded_scale, scale[source].view(expanded_scale.shape))
    if tokens_type != _TOKENS_COUNTED:
        raise NotImplementedError(f"expert_tokens_num_type {tokens_type} is not simulated")
    write(tokens, torch.bincount(experts.reshape(-1).long(), minlength=expert_count))


@operator("aclnnMoeTokenPermute", "TTibTT")
def _permute(
    tokens: torch.Tensor,
    experts: torch.Tensor,
    count: int,
    padded: bool,
    permuted: torch.Tensor,
    places: torch.Tensor,
) -> None:
    if padded:
        raise NotImplementedError("padded_mode is not simulated")
    choices = experts.shape[1] if experts.dim() > 1 else 1
    order, place = _route(experts)
    write(permuted, tokens[order[: permuted.shape[0]] // choices])
    write(places, place.view(places.shape))


@operator("aclnnMoeTokenUnpermute", "TTTbAT", check=check_unpermute)
def _unpermute(
    permuted: torch.Tensor,
    places: torch.Tensor,
    weights: torch.Tensor | None,
    padded: bool,
    _shape: list[int] | None,
    out: torch.Tensor,
) -> None:
    """Add the rows of each token's choices, weighted, in float32."""
    if padded:
        raise NotImplementedError("padded_mode is not simulated")
    rows = permuted.float()[places.reshape(-1).long()].view(out.shape[0], -1, out.shape[-1])
    if weights is not None and weights.numel():
        rows = rows * weights.float()[..., None]
    write(out, rows.sum(1))


@operator("aclnnMoeComputeExpertTokens", "TiT")
def _expert_tokens(experts: torch.Tensor, count: int, out: torch.Tensor) -> None:
    """Return how many rows of the sorted list go to experts up to each one."""
    write(out, torch.bincount(experts.long(), minlength=count).cumsum(0))
