"""What the operators for mixtures of experts refuse, as their documentation in op-plugin says."""

from __future__ import annotations

from typing import Any

import torch

from ..constraints import require, require_dtype

_DOCS = "docs/zh/custom_APIs/torch_npu/torch_npu-npu_"
_GATING = f"{_DOCS}moe_gating_top_k_softmax.md"
_GROUPED_GATING = f"{_DOCS}moe_gating_top_k.md"
_ROUTING = f"{_DOCS}moe_init_routing_v2.md"
_UNPERMUTE = f"{_DOCS}moe_token_unpermute.md"

_FLOATS = (torch.bfloat16, torch.float16, torch.float32)
_MAX_K, _MAX_CHOICES, _MAX_EXPERTS = 1024, 512, 10240

#: ``expert_tokens_num_type``: rows of each expert, or pairs of expert and rows.
_TOKENS_TYPES = (1, 2)


def check_gating(logits: torch.Tensor, _finished: Any, k: int, *_: Any) -> None:
    """Check aclnnMoeGatingTopKSoftmax."""
    require_dtype(_GATING, _FLOATS, x=logits)
    require(logits.dim() in (2, 3), f"x {tuple(logits.shape)} must have 2 or 3 dims", _GATING)
    limit = min(_MAX_K, logits.shape[-1])
    require(0 < k <= limit, f"k {k} outside 1 to {limit}", _GATING)


def check_grouped_gating(logits: torch.Tensor, _bias: Any, *attributes: Any) -> None:
    """Check aclnnMoeGatingTopK; torch_npu has checked the bias."""
    where = _GROUPED_GATING
    k, kept, groups, group_mode, renorm, norm = attributes[:6]
    require_dtype(where, _FLOATS, x=logits)
    require(logits.dim() == 2, f"x {tuple(logits.shape)} must have 2 dims", where)
    experts = logits.shape[-1]
    require(experts <= 2048, f"{experts} experts; at most 2048", where)
    require(
        groups > 0 and experts % groups == 0 and experts // groups > 2,
        f"group_count {groups} must cut {experts} experts into equal groups of more than 2",
        where,
    )
    group = experts // groups
    require(
        -(-group // 32) * 32 * groups <= 2048,
        f"{groups} groups of {group} experts, padded to whole 32, are more than 2048",
        where,
    )
    require(1 <= kept <= groups, f"k_group {kept} outside 1 to {groups}", where)
    require(1 <= k <= group * kept, f"k {k} outside 1 to {group * kept}", where)
    require(group_mode in (0, 1), f"group_select_mode {group_mode}; allowed: 0, 1", where)
    require(renorm == 0, f"renorm {renorm}; only 0 is supported", where)
    require(norm in (0, 1), f"norm_type {norm}; allowed: 0, 1", where)


def check_routing(
    x: torch.Tensor, experts: torch.Tensor, _scale: Any, _offset: Any, *attributes: Any
) -> None:
    """Check aclnnMoeInitRoutingV3."""
    _, _, count, drop, tokens_type, tokens_flag = attributes[:6]
    require_dtype(_ROUTING, (*_FLOATS, torch.int8), x=x)
    require_dtype(_ROUTING, (torch.int32,), expert_idx=experts)
    require(
        x.dim() == experts.dim() == 2 and x.shape[0] == experts.shape[0],
        f"x {tuple(x.shape)} and expert_idx {tuple(experts.shape)} must be [rows, H], [rows, K]",
        _ROUTING,
    )
    require(0 < count <= _MAX_EXPERTS, f"expert_num {count} outside 1 to {_MAX_EXPERTS}", _ROUTING)
    require(drop == 0, f"drop_pad_mode {drop}; only 0 is supported", _ROUTING)
    require(
        tokens_type in _TOKENS_TYPES,
        f"expert_tokens_num_type {tokens_type}; supported: {_TOKENS_TYPES}",
        _ROUTING,
    )
    require(tokens_flag, "expert_tokens_num_flag False; only True is supported", _ROUTING)


def check_unpermute(permuted: torch.Tensor, places: torch.Tensor, probs: Any, *_: Any) -> None:
    """Check aclnnMoeTokenUnpermute."""
    require_dtype(_UNPERMUTE, _FLOATS, permuted_tokens=permuted)
    require_dtype(_UNPERMUTE, (torch.int32,), sorted_indices=places)
    if probs is not None and probs.numel():
        require_dtype(_UNPERMUTE, _FLOATS, probs=probs)
        require(
            probs.dim() == 2 and probs.numel() == places.numel(),
            f"probs {tuple(probs.shape)} for {places.numel()} sorted_indices",
            _UNPERMUTE,
        )
        choices = probs.shape[1]
        require(
            choices <= _MAX_CHOICES, f"{choices} of a token; at most {_MAX_CHOICES}", _UNPERMUTE
        )
