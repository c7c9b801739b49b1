"""Readings as padded batches of tensors."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from ascend_plugin.mtp.hidden import Reading


@dataclass(frozen=True, slots=True, eq=False)
class Batch:
    """Sequences, padded on the right. Position t drafts the token after token t + 1.

    Attributes:
        hidden: bfloat16 ``[batch, tokens, hidden]``, of the base.
        next_hidden: the same, one position later: what a perfect draft would have.
        next_ids: int64 ``[batch, tokens]``, of token t + 1.
        top_ids, top_logprobs: ``[batch, tokens, top]``: the base's likely tokens t + 2.
        used: bool ``[batch, tokens]``: positions that are learnt from.
    """

    hidden: torch.Tensor
    next_hidden: torch.Tensor
    next_ids: torch.Tensor
    top_ids: torch.Tensor
    top_logprobs: torch.Tensor
    used: torch.Tensor

    @classmethod
    def of(cls, readings: Sequence[Reading]) -> Batch:
        """Join readings of two tokens or more; what the base was given is not learnt from."""

        def pad(parts: list[torch.Tensor]) -> torch.Tensor:
            return torch.nn.utils.rnn.pad_sequence(parts, batch_first=True)

        used = [
            torch.arange(len(reading.ids) - 1) >= max(0, reading.start - 1) for reading in readings
        ]
        return cls(
            pad([reading.hidden[:-1] for reading in readings]),
            pad([reading.hidden[1:] for reading in readings]),
            pad([reading.ids[1:] for reading in readings]),
            pad([reading.top_ids[1:] for reading in readings]),
            pad([reading.top_logprobs[1:] for reading in readings]),
            pad(used),
        )


def epoch(readings: Sequence[Reading], tokens: int, seed: int) -> Iterator[list[Reading]]:
    """Yield all readings in batches of about ``tokens`` tokens, of like lengths, in drawn order.

    Args:
        readings: of two tokens or more; shorter ones are left out.
        tokens: of a batch, padding included.
        seed: of the order.
    """
    draw = random.Random(seed)
    order = sorted(
        (reading for reading in readings if len(reading.ids) > 1),
        key=lambda reading: len(reading.ids) + draw.uniform(-16, 16),
    )
    groups: list[list[Reading]] = [[]]
    for reading in order:
        longest = max((len(other.ids) for other in groups[-1]), default=0)
        if groups[-1] and (len(groups[-1]) + 1) * max(longest, len(reading.ids)) > tokens:
            groups.append([])
        groups[-1].append(reading)
    draw.shuffle(groups)
    yield from (group for group in groups if group)
