"""In float32 the plugin generates what stock vLLM generates, however the work is cut up."""

from __future__ import annotations

import pytest
from engines import Answer, EngineProcess, assert_same
from prompts import mixed_prompts, tokens
from tiny_engines import TinyModels, assert_is_plugin, settings

pytestmark = pytest.mark.engine

PROMPTS = mixed_prompts()
RUN = {"prompts": PROMPTS, "max_tokens": 24}


@pytest.fixture(scope="module")
def want(stock: EngineProcess, tiny: TinyModels) -> Answer:
    """What stock vLLM says to every prompt, on its own block size."""
    answer = stock.run(settings(tiny("llama")), RUN)
    assert answer.made_of["platform"] == "CpuPlatform"
    assert answer.made_of["backends"] == ["CPUAttentionBackend"]
    return answer


def test_the_prompts_are_worth_it(want: Answer) -> None:
    """Guards the other tests: outputs differ between prompts, and within one."""
    outputs = want.outputs()
    assert len(outputs) >= 40
    assert len({tuple(output.tokens) for output in outputs}) == len(outputs)
    assert sum(len(set(output.tokens)) for output in outputs) > 10 * len(outputs)


@pytest.mark.parametrize("block_size", [16, 32, 128, 256])
def test_chunked_prefill_and_decode(
    plugin: EngineProcess, tiny: TinyModels, want: Answer, block_size: int
) -> None:
    answer = plugin.run(settings(tiny("llama"), block_size=block_size), RUN)
    assert_is_plugin(answer, block_size)
    assert_same(want.outputs(), answer.outputs())


def test_the_reference_gives_the_same(
    plugin: EngineProcess, tiny: TinyModels, want: Answer
) -> None:
    config = {"ops": {"implementation": "reference"}}
    answer = plugin.run(settings(tiny("llama"), additional_config=config), RUN)
    assert_is_plugin(answer, implementation="reference")
    assert_same(want.outputs(), answer.outputs())


def test_prefix_cache_hits(plugin: EngineProcess, stock: EngineProcess, tiny: TinyModels) -> None:
    shared = tokens(330, seed=1)
    first = [shared + tokens(10, seed=2), tokens(200, seed=3)]
    again = [shared + tokens(n, seed=n) for n in (1, 40, 90)] + [shared[:200] + tokens(9), first[1]]
    runs = [{"prompts": prompts, "max_tokens": 40} for prompts in (first, again, again)]
    fresh = stock.run(settings(tiny("llama"), enable_prefix_caching=False), *runs[:2])
    answer = plugin.run(settings(tiny("llama"), block_size=16, enable_prefix_caching=True), *runs)
    assert_same(fresh.outputs(0), answer.outputs(0))
    for run in (1, 2):
        assert_same(fresh.outputs(1), answer.outputs(run))
    assert [output.cached for output in answer.outputs(0)] == [0, 0]
    assert [output.cached for output in answer.outputs(1)] == [320, 320, 320, 192, 192]
    assert all(output.cached > 192 for output in answer.outputs(2)[:3])


def test_preemption_and_reused_blocks(
    plugin: EngineProcess, stock: EngineProcess, tiny: TinyModels
) -> None:
    prompts = [tokens(60 + 7 * i, seed=i) for i in range(20)]
    runs = [{"prompts": prompts, "max_tokens": 90}, {"prompts": prompts[::-1], "max_tokens": 90}]
    roomy = stock.run(settings(tiny("llama"), enable_prefix_caching=False), *runs)
    tight = settings(
        tiny("llama"),
        block_size=16,
        max_model_len=1024,
        num_gpu_blocks_override=70,  # 1,120 tokens for 20 requests of 150 to 283
        enable_prefix_caching=False,
    )
    answer = plugin.run(tight, *runs)
    assert answer.metrics["vllm:num_preemptions"] > 10
    assert roomy.metrics["vllm:num_preemptions"] == 0
    for run in (0, 1):
        assert_same(roomy.outputs(run), answer.outputs(run))


@pytest.mark.slow
def test_compiled(plugin: EngineProcess, tiny: TinyModels, want: Answer) -> None:
    compiled = {"compilation_config": {"mode": 3}, "max_num_seqs": 24}
    answer = plugin.run(settings(tiny("llama"), **compiled), RUN)
    assert_is_plugin(answer, compiled=True)
    assert "DYNAMO_TRACE_ONCE" in answer.log
    assert_same(want.outputs(), answer.outputs())
