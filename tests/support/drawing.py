"""The exact distribution of drawn tokens, and how likely draws are under it."""

from __future__ import annotations

from collections import Counter

import torch
from offline_mtp import OfflineDrafts
from prompts import tokens

#: Of models whose whole distribution of two tokens is computed.
VOCABULARY = 24
PROMPT = [2 + token % (VOCABULARY - 2) for token in tokens(11, seed=4)]
#: Less likely than this by chance is taken for wrong; seeds are fixed, so the answer never changes.
LEVEL = 1e-3


def pairs(offline: OfflineDrafts, temperature: float, frequency: float) -> torch.Tensor:
    """Return the probability ``[vocabulary, vocabulary]`` of the second and third token."""

    def following(generated: torch.Tensor) -> torch.Tensor:
        """Return probabilities ``[rows, vocabulary]`` after ``[rows, n]`` generated tokens."""
        prompt = torch.tensor([PROMPT]).expand(len(generated), -1)
        logits = offline.logits(torch.cat([prompt, generated], 1))[:, -1].double()
        seen = torch.zeros_like(logits)
        seen.scatter_add_(1, generated, torch.ones(generated.shape, dtype=torch.float64))
        return ((logits - frequency * seen) / temperature).softmax(-1)

    every = torch.arange(VOCABULARY)
    first = following(torch.empty(1, 0, dtype=torch.int64))[0]
    second = following(every[:, None])  # [first, second]
    both = torch.cartesian_prod(every, every)
    third = following(both).view(VOCABULARY, VOCABULARY, VOCABULARY)
    return torch.einsum("a,ab,abc->bc", first, second, third)


def chance(drawn: list[list[int]], expected: torch.Tensor) -> float:
    """Return how likely draws as far off as these are (Pearson's chi-squared test)."""
    counts = Counter((draw[1], draw[2]) for draw in drawn)
    want = expected.flatten() * len(drawn)
    got = torch.zeros_like(want)
    for (second, third), count in counts.items():
        got[second * VOCABULARY + third] = count
    rare = want < 5  # too few each: taken together
    want = torch.cat([want[~rare], want[rare].sum()[None]])
    got = torch.cat([got[~rare], got[rare].sum()[None]])
    statistic = ((got - want) ** 2 / want).sum()
    return float(torch.special.gammaincc(torch.tensor((len(want) - 1) / 2).double(), statistic / 2))
