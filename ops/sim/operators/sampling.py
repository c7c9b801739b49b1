"""Sampling helpers that are one operator on the NPU."""

from __future__ import annotations

import torch

from ..constraints import ConstraintError
from ..table import operator, write

_TOP_K_TOP_P = "docs/zh/custom_APIs/torch_npu/torch_npu-npu_top_k_top_p.md"

MAX_TOP_K = 1024


def _check(
    logits: torch.Tensor, top_p: torch.Tensor | None, top_k: torch.Tensor | None, *_: object
) -> None:
    if logits.dim() != 2:
        raise ConstraintError(f"logits {tuple(logits.shape)} must have 2 dimensions", _TOP_K_TOP_P)
    for name, each, dtype in (("p", top_p, logits.dtype), ("k", top_k, torch.int32)):
        if each is None or not each.numel():
            continue
        if each.dtype != dtype or tuple(each.shape) != (logits.shape[0],):
            raise ConstraintError(
                f"{name} {tuple(each.shape)} {each.dtype} must be {dtype} with one value for "
                f"each of {logits.shape[0]} rows",
                _TOP_K_TOP_P,
            )


@operator("aclnnApplyTopKTopP", "TTTT", check=_check)
def _top_k_top_p(
    logits: torch.Tensor,
    top_p: torch.Tensor | None,
    top_k: torch.Tensor | None,
    out: torch.Tensor,
) -> None:
    """Put -inf where a token is outside the k largest, or outside the smallest set of mass p."""
    values, order = logits.float().sort(-1)  # [requests, vocabulary], ascending
    if top_k is not None and top_k.numel():
        limit = min(MAX_TOP_K, logits.shape[-1])
        if int(top_k.min()) < 1 or int(top_k.max()) > limit:  # contents: known only here
            raise ConstraintError(f"k {top_k.tolist()} outside 1 to {limit}", _TOP_K_TOP_P)
        last = values.shape[-1] - top_k.long()
        values = values.masked_fill(values < values.gather(-1, last[:, None]), -torch.inf)
    if top_p is not None and top_p.numel():
        mass = values.softmax(-1).cumsum(-1)
        drop = mass <= 1 - top_p.float()[:, None]
        drop[:, -1] = False  # the most probable token stays
        values = values.masked_fill(drop, -torch.inf)
    write(out, torch.empty_like(values).scatter_(-1, order, values))
