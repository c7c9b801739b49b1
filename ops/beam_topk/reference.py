"""The meaning of ``beam_topk`` in plain torch."""

from __future__ import annotations

from typing import NamedTuple

import torch

from ..quantise import MAX_CODE, SMALLEST_SCALE

#: Logits below it (-infinity) count as it, so that the softmax over masked tokens has no NaN.
LOWEST = torch.finfo(torch.float32).min


class QuantisedLogits(NamedTuple):
    """Logits in 8 bits.

    Attributes:
        codes: int8 ``[rows, vocab]``, -127 to 127.
        scales: float32 ``[rows]``.
    """

    codes: torch.Tensor
    scales: torch.Tensor


class TopK(NamedTuple):
    """The best tokens of each row, greatest score first.

    Attributes:
        indices: int32 ``[rows, k]``.
        scores: float32 ``[rows, k]``.
        log_probs: float32 ``[rows, k]``, log-softmax over the row's k scores.
    """

    indices: torch.Tensor
    scores: torch.Tensor
    log_probs: torch.Tensor


def quantise_logits(logits: torch.Tensor) -> QuantisedLogits:
    """Quantise each row of ``[rows, vocab]`` by its largest finite magnitude.

    ``code = clamp(rint(x * (1 / scale)), -127, 127)`` in float32, with ``scale = max |x| / 127``.
    -infinity becomes -127. A row of zeros (or of subnormal numbers) gets codes and scale 0.
    """
    x = logits.float()
    largest = x.abs().masked_fill(~x.isfinite(), 0.0).amax(-1)
    scales = largest / MAX_CODE
    usable = scales >= SMALLEST_SCALE
    inverse = torch.where(usable, 1.0 / scales, 0.0)
    scaled = (x * inverse[:, None]).masked_fill(x == -torch.inf, -MAX_CODE)
    codes = scaled.round().clamp(-MAX_CODE, MAX_CODE).to(torch.int8)
    return QuantisedLogits(codes, torch.where(usable, scales, 0.0))


def candidates(codes: torch.Tensor, k: int) -> torch.Tensor:
    """Say which tokens can be among the k greatest logits: bool ``[rows, vocab]``.

    Let every logit differ from ``code * scale`` by less than one step. A token whose code is two
    or more below those of k others lies below all of these, so it is not among the k greatest.
    """
    wide = codes.short()  # one below -127 fits too
    kth = wide.topk(k, -1).values[:, -1:]
    return wide >= kth - 1


def beam_topk(
    codes: torch.Tensor, scales: torch.Tensor, k: int, logits: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return indices, scores and log-probabilities; see the operator's documentation."""
    if logits is None:
        kept, indices = _greatest(codes, k)
        scores = kept.float() * scales[:, None]
    else:
        clamped = logits.float().clamp(min=LOWEST)  # [rows, vocab]
        scores, indices = _greatest(clamped.masked_fill(~candidates(codes, k), -torch.inf), k)
    log_probs = scores.double().log_softmax(-1).float()
    return indices.int(), scores, log_probs


def _greatest(values: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the k greatest of each row; the lower index comes first among equals."""
    ordered, indices = values.sort(dim=-1, descending=True, stable=True)
    return ordered[:, :k].contiguous(), indices[:, :k]
