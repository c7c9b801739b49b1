"""Prompts, settings and counts that the engine tests of draft layers share."""

from __future__ import annotations

import operator
from functools import reduce
from typing import Any

from engines import Answer, EngineProcess, Output, first_differences
from offline_mtp import Counts, OfflineDrafts
from prompts import mixed_prompts
from tiny_engines import settings

MIMO = {"architecture": "mimo", "hidden": 256, "heads": 4, "kv_heads": 2}
#: Longest proposal, and so many more tokens than are compared are generated without speculation.
LONGEST = 4
TOKENS = 40
PROMPTS = mixed_prompts(longest=500)[::4]
RUN = {"prompts": PROMPTS, "max_tokens": TOKENS}

#: Logprobs in bfloat16 move by steps of this size; choices that are closer are no mistakes.
BFLOAT16_TIE = 0.07


def mtp(count: int, **more: Any) -> dict[str, Any]:
    """The speculation of a proposal of so many drafts."""
    return {"speculative_config": {"method": "mtp", "num_speculative_tokens": count, **more}}


def cut(outputs: list[Output], tokens: int) -> list[Output]:
    """Return the first tokens of completions."""
    kept = slice(tokens)
    return [Output(o.tokens[kept], o.logprobs[kept], o.margins[kept], o.cached) for o in outputs]


def expected(
    offline: OfflineDrafts, greedy: list[Output], count: int, run: dict[str, Any] = RUN
) -> Counts:
    """How many drafts must be accepted in a run that nothing preempts.

    Args:
        offline: the model.
        greedy: what the model says, at least ``count`` tokens longer than the run.
        count: drafts of a proposal.
        run: its prompts, and how many tokens it generates.
    """
    walks = [
        offline.walk(prompt, [*prompt, *output.tokens], run["max_tokens"], (count,))
        for prompt, output in zip(run["prompts"], greedy, strict=True)
    ]
    return reduce(operator.add, walks)


def accepted_share(answer: Answer) -> float:
    """Return accepted drafts per proposal of a job."""
    accepted = answer.metrics["vllm:spec_decode_num_accepted_tokens"]
    return accepted / answer.metrics["vllm:spec_decode_num_drafts"]


def check_bfloat16(plugin: EngineProcess, model: str) -> None:
    """Several tokens in a step are added up otherwise than one: near ties may be decided anew."""
    half = {"dtype": "bfloat16", "block_size": 16}
    plain = plugin.run(settings(model) | half, RUN)
    answer = plugin.run(settings(model) | half | mtp(3), RUN)
    drafts = answer.runs[0]["drafts"]
    assert drafts["accepted_tokens"] > 0.5 * drafts["drafts"]
    differences = first_differences(plain.outputs(), answer.outputs())
    assert len(differences) < len(PROMPTS) / 2
    for difference in differences:
        assert difference.margin < BFLOAT16_TIE, difference


def counted(run: dict[str, Any], count: int) -> Counts:
    """How many drafts an engine says were accepted."""
    found = run["drafts"]
    places = tuple(int(found[f"accepted_tokens_per_pos_{i}"]) for i in range(count))
    return Counts(int(found["drafts"]), places)
