"""Cross entropy between the base's distribution and the draft's, over the tokens that occur.

The gradient with respect to the draft's output is computed together with the loss, some positions
at a time: logits of a whole batch never exist, and the projection, which is frozen, gets none.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ascend_plugin.mtp.hidden import Reading
from ascend_plugin.spec_decode.token_order import TokenOrder

_POSITIONS = 512


@dataclass(frozen=True, slots=True, eq=False)
class Head:
    """The rows of the projection to logits that training looks at.

    Attributes:
        weight: bfloat16 ``[kept, hidden]``.
        place: int64 ``[vocabulary]``: the row of a token in ``weight``; -1: left out.
        order: the kept tokens that have mass, most first.
        coverage: share of the base's mass that the kept tokens have.
    """

    weight: torch.Tensor
    place: torch.Tensor
    order: TokenOrder
    coverage: float


def choose_head(weight: torch.Tensor, readings: Sequence[Reading], count: int) -> Head:
    """Keep the ``count`` tokens to which the base gives most mass over all readings.

    Args:
        weight: ``[vocabulary, hidden]``.
        readings: what the base said.
        count: how many tokens; all of the vocabulary if it has fewer.
    """
    mass = torch.zeros(len(weight))
    for reading in readings:
        probabilities = reading.top_logprobs.float().exp().flatten()
        mass.index_add_(0, reading.top_ids.flatten(), probabilities)
    ranked = mass.topk(min(count, len(weight))).indices
    order = TokenOrder(ranked[mass[ranked] > 0].int(), len(weight))
    kept = ranked.sort().values
    place = torch.full((len(weight),), -1)
    place[kept] = torch.arange(len(kept))
    coverage = float(mass[kept].sum() / mass.sum())
    rows = weight[kept.to(weight.device)].bfloat16().contiguous()
    return Head(rows, place, order, coverage)


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        output: torch.Tensor,
        head: torch.Tensor,
        places: torch.Tensor,
        probabilities: torch.Tensor,
    ) -> torch.Tensor:
        """Return the mean loss and keep its gradient."""
        gradient = torch.empty_like(output)
        total = output.new_zeros((), dtype=torch.float32)
        for start in range(0, len(output), _POSITIONS):
            part = slice(start, start + _POSITIONS)
            logits = (output[part].to(head.dtype) @ head.T).float()  # [positions, kept]
            norm = logits.logsumexp(-1, keepdim=True)
            wanted, p = places[part], probabilities[part]
            mass = p.sum(-1, keepdim=True)
            total += (mass * norm - (p * logits.gather(1, wanted)).sum(-1, keepdim=True)).sum()
            difference = logits.sub_(norm).exp_().mul_(mass)
            difference.scatter_add_(1, wanted, -p)
            gradient[part] = (difference.to(head.dtype) @ head).to(gradient.dtype)
        ctx.save_for_backward(gradient / max(1, len(output)))
        return total / max(1, len(output))

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:
        (gradient,) = ctx.saved_tensors
        return grads[0] * gradient, None, None, None


def cross_entropy(
    output: torch.Tensor, head: Head, top_ids: torch.Tensor, top_logprobs: torch.Tensor
) -> torch.Tensor:
    """Return the mean cross entropy of the draft against the base.

    KL divergence but for the base's entropy, which the draft does not change. Tokens outside of
    ``head`` have no part.

    Args:
        output: ``[positions, hidden]``, of the draft layer.
        head: which tokens take part.
        top_ids: int32 ``[positions, top]``, the base's likely tokens.
        top_logprobs: float16 ``[positions, top]``, under the whole vocabulary.

    Returns:
        A float32 scalar.
    """
    places = head.place[top_ids]
    probabilities = top_logprobs.float().exp() * (places >= 0)
    loss: torch.Tensor = _CrossEntropy.apply(
        output, head.weight, places.clamp_min(0).to(output.device), probabilities.to(output.device)
    )
    return loss
