"""Prompts, settings and counts that the engine tests of draft layers share."""

from __future__ import annotations

import operator
from functools import reduce
from typing import Any

from engines import Output
from offline_mtp import Counts, OfflineMTP
from prompts import mixed_prompts

MIMO = {"architecture": "mimo", "hidden": 256, "heads": 4, "kv_heads": 2}
#: Longest proposal, and so many more tokens than are compared are generated without speculation.
LONGEST = 4
TOKENS = 40
PROMPTS = mixed_prompts(longest=500)[::4]
RUN = {"prompts": PROMPTS, "max_tokens": TOKENS}


def mtp(count: int, **more: Any) -> dict[str, Any]:
    """The speculation of a proposal of so many drafts."""
    return {"speculative_config": {"method": "mtp", "num_speculative_tokens": count, **more}}


def expected(offline: OfflineMTP, greedy: list[Output], count: int) -> Counts:
    """How many drafts must be accepted."""
    walks = [
        offline.walk(prompt, [*prompt, *output.tokens], TOKENS, (count,))
        for prompt, output in zip(PROMPTS, greedy, strict=True)
    ]
    return reduce(operator.add, walks)


def counted(run: dict[str, Any], count: int) -> Counts:
    """How many drafts an engine says were accepted."""
    found = run["drafts"]
    places = tuple(int(found[f"accepted_tokens_per_pos_{i}"]) for i in range(count))
    return Counts(int(found["drafts"]), places)
