"""Bad requests are refused by themselves; the engine answers the next one."""

from __future__ import annotations

import pytest
from engines import EngineProcess, assert_same
from prompts import tokens
from tiny_engines import TinyModels, settings

pytestmark = pytest.mark.engine

GOOD = {"prompts": [tokens(40)], "max_tokens": 8}


@pytest.mark.parametrize("bad", [256, 99_999_999, -1])
def test_ids_beyond_the_vocabulary_without_tokenizer(
    plugin: EngineProcess, tiny: TinyModels, bad: int
) -> None:
    run = {"prompts": [[5, bad, 7]], "max_tokens": 4}
    answer = plugin.run(settings(tiny("llama")), GOOD, run, GOOD)
    refused = answer.runs[1]["refused"]
    assert f"Token id {bad} is out of vocabulary: the model has ids 0 to 255" in refused
    assert "Tokenize the prompt with the model's own tokenizer" in refused
    assert_same(answer.outputs(0), answer.outputs(2))


def test_the_largest_id_is_served(plugin: EngineProcess, tiny: TinyModels) -> None:
    run = {"prompts": [[0, 255, 1]], "max_tokens": 4}
    assert len(plugin.run(settings(tiny("llama")), run).outputs()[0].tokens) == 4


@pytest.mark.model
def test_ids_beyond_the_vocabulary_with_tokenizer(plugin: EngineProcess, smollm2: str) -> None:
    bad = {"prompts": [[5, 49_152, 7]], "max_tokens": 4}
    good = {"prompts": ["The capital of France is"], "max_tokens": 4}
    engine = {
        "model": smollm2,
        "dtype": "bfloat16",
        "enforce_eager": True,
        "max_model_len": 2048,
        "kv_cache_memory_bytes": 1 << 28,
    }
    answer = plugin.run(engine, good, bad, good)
    refused = answer.runs[1]["refused"]
    assert "49152" in refused
    assert "out of vocabulary" in refused
    assert_same(answer.outputs(0), answer.outputs(2))


def test_a_seeded_draw_does_not_depend_on_chunks(plugin: EngineProcess, tiny: TinyModels) -> None:
    """Nor does its engine die of chunks: nothing is drawn for a prompt that is not yet read."""
    drawn = {"temperature": 1.0, "seed": 7}
    run = {"prompts": [tokens(300, seed=4)], "max_tokens": 12, "sampling": drawn}
    again = run | {"sampling": drawn | {"seed": 8}}
    model = tiny("llama")
    chunks = plugin.run(settings(model, enable_prefix_caching=False), run, again)
    whole = plugin.run(settings(model, max_num_batched_tokens=512), run)
    assert chunks.outputs(0)[0].tokens == whole.outputs()[0].tokens
    assert chunks.outputs(0)[0].tokens != chunks.outputs(1)[0].tokens
