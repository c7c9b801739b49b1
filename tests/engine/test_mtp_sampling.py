"""Drafts do not change what is drawn: the distribution of tokens is the model's."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from engines import EngineProcess
from offline_mtp import OfflineMTP
from prompts import tokens
from tiny_engines import TinyModels, settings

from ascend_plugin.spec_decode.token_order import TokenOrder, save_order

pytestmark = pytest.mark.engine

VOCABULARY = 24
PROMPT = [2 + token % (VOCABULARY - 2) for token in tokens(11, seed=4)]
DRAWS = 3000
#: Less likely than this by chance is taken for wrong; seeds are fixed, so the answer never changes.
LEVEL = 1e-3


@pytest.fixture(scope="module")
def model(tiny: TinyModels) -> str:
    shape = {"architecture": "mimo", "hidden": 256, "heads": 4, "kv_heads": 2}
    return tiny("mimo of few tokens", vocab=VOCABULARY, **shape)


@pytest.fixture(scope="module")
def offline(model: str) -> OfflineMTP:
    return OfflineMTP(model)


def pairs(offline: OfflineMTP, temperature: float, frequency: float) -> torch.Tensor:
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


def engine(model: str, head: str | None = None, **speculation: Any) -> dict[str, Any]:
    more = {"speculative_config": {"method": "mtp", **speculation}} if speculation else {}
    if head:
        more["additional_config"] = {"speculation": {"draft_head": {"file": head}}}
    return settings(model, max_num_seqs=64, max_num_batched_tokens=512, block_size=16, **more)


def drawn(
    plugin: EngineProcess, engine: dict[str, Any], temperature: float, frequency: float
) -> list[list[int]]:
    sampling = {"temperature": temperature, "frequency_penalty": frequency}
    run = {"prompts": [PROMPT] * DRAWS, "max_tokens": 4, "sampling": sampling}
    answer = plugin.run(engine, run)
    if "speculative_config" in engine:
        accepted = answer.metrics["vllm:spec_decode_num_accepted_tokens"]
        assert 0 < accepted < answer.metrics["vllm:spec_decode_num_draft_tokens"]
    return [output.tokens for output in answer.outputs()]


@pytest.mark.parametrize("frequency", [0.0, 0.8], ids=["plain", "penalty"])
@pytest.mark.parametrize("draft_sample_method", ["greedy", "probabilistic"])
def test_the_distribution_is_the_models(
    plugin: EngineProcess,
    model: str,
    offline: OfflineMTP,
    draft_sample_method: str,
    frequency: float,
) -> None:
    speculation = {"num_speculative_tokens": 2, "draft_sample_method": draft_sample_method}
    found = drawn(plugin, engine(model, **speculation), 0.9, frequency)
    assert chance(found, pairs(offline, 0.9, frequency)) > LEVEL


@pytest.mark.parametrize("draft_sample_method", ["greedy", "probabilistic"])
def test_a_draft_head_leaves_it_alone(
    plugin: EngineProcess,
    model: str,
    offline: OfflineMTP,
    tmp_path: Path,
    draft_sample_method: str,
) -> None:
    """Drafts are among half of the tokens; the other half is drawn as often as ever."""
    head = tmp_path / "head.safetensors"
    save_order(head, TokenOrder(torch.arange(0, VOCABULARY, 2).int(), VOCABULARY), {})
    speculation = {"num_speculative_tokens": 2, "draft_sample_method": draft_sample_method}
    found = drawn(plugin, engine(model, str(head), **speculation), 0.9, 0.0)
    assert chance(found, pairs(offline, 0.9, 0.0)) > LEVEL


def test_the_test_would_notice(plugin: EngineProcess, model: str, offline: OfflineMTP) -> None:
    """Guards the one above: slightly other distributions are told apart with as many draws."""
    found = drawn(plugin, engine(model), 0.9, 0.0)
    assert chance(found, pairs(offline, 0.9, 0.0)) > LEVEL
    assert chance(found, pairs(offline, 1.1, 0.0)) < LEVEL / 10
    assert chance(found, pairs(offline, 0.9, 0.6)) < LEVEL / 10
