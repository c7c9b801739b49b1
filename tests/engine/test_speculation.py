"""Speculative decoding with an n-gram proposer: the tokens of decoding without it."""

from __future__ import annotations

import pytest
from engines import EngineProcess, assert_same
from prompts import mixed_prompts, repetitive
from tiny_engines import TinyModels, assert_is_plugin, settings

pytestmark = pytest.mark.engine

NGRAM = {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 4}
PROMPTS = [repetitive(20 + 17 * i, seed=i) for i in range(8)] + mixed_prompts(longest=900)[::4]


def test_ngram(plugin: EngineProcess, stock: EngineProcess, tiny: TinyModels) -> None:
    model = tiny("small vocabulary", vocab=24)
    prompts = [[2 + token % 22 for token in prompt] for prompt in PROMPTS]
    run = {"prompts": prompts, "max_tokens": 60}
    plain = stock.run(settings(model), run)
    answer = plugin.run(settings(model, block_size=16, speculative_config=NGRAM), run)
    assert_is_plugin(answer, block_size=16)
    drafted = answer.metrics["vllm:spec_decode_num_draft_tokens"]
    accepted = answer.metrics["vllm:spec_decode_num_accepted_tokens"]
    assert 0 < accepted < drafted, "nothing accepted, or nothing refused: too little is tested"
    assert_same(plain.outputs(), answer.outputs())
