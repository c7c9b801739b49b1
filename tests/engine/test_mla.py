"""Latent attention (MLA): tiny DeepSeek models give what Hugging Face's give, in float32."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from engines import Answer, EngineProcess, Output, assert_same, first_differences
from prompts import mixed_prompts, tokens
from tiny_deepseek import generate, write_tiny_deepseek, write_with_scales
from tiny_engines import settings

pytestmark = pytest.mark.engine

PROMPTS = mixed_prompts(longest=700)[::2]
RUN = {"prompts": PROMPTS, "max_tokens": 16}
INT8 = {"kv_cache_dtype": "int8_per_token_head"}

#: DeepSeek's own latent of 512 and 64; sizes that int8 pages pad; queries that are not compressed.
MODELS: dict[str, dict[str, Any]] = {
    "v3": {"version": "v3"},
    "v2": {"version": "v2", "kv_lora_rank": 512, "qk_rope_head_dim": 64},
    "odd": {"version": "v3", "kv_lora_rank": 48, "qk_rope_head_dim": 32, "num_attention_heads": 3},
}


@pytest.fixture(scope="module")
def deepseek(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], str]:
    """Write tiny models by name, when first asked for."""
    folder = tmp_path_factory.mktemp("deepseek")

    def write(name: str) -> str:
        path = folder / name
        if path.exists():
            return str(path)
        changes = dict(MODELS[name])
        if "num_attention_heads" in changes:
            changes["num_key_value_heads"] = changes["num_attention_heads"]
        return write_tiny_deepseek(path, **changes)

    return write


@pytest.fixture(scope="module")
def want(deepseek: Callable[[str], str]) -> Callable[[str], list[Output]]:
    """What Hugging Face says, by name of the model."""
    known: dict[str, list[Output]] = {}

    def said(name: str) -> list[Output]:
        if name not in known:
            known[name] = generate(deepseek(name), PROMPTS, RUN["max_tokens"])
        return known[name]

    return said


def assert_is_plugin(answer: Answer, block_size: int = 128, **expected: Any) -> None:
    """The plugin's backend and operators served the job, with chunks."""
    made_of = answer.made_of
    assert made_of["platform"] == "AscendCPUPlatform"
    assert made_of["backends"] == [expected.get("backend", "AscendCPUMLABackend")]
    assert made_of["block_sizes"] == [block_size]
    assert made_of["dtypes"] == [expected.get("dtype", "torch.float32")]
    assert made_of["batched_tokens"] == 96
    served = made_of["implementations"]
    implementation = expected.get("implementation", "native")
    assert served["mla_cache_write"] == served["mla_attention"] == [implementation]


def test_the_prompts_are_worth_it(want: Callable[[str], list[Output]]) -> None:
    """Guards the other tests: outputs differ between prompts, and within one."""
    outputs = want("v3")
    assert len(outputs) >= 20
    assert len({tuple(output.tokens) for output in outputs}) == len(outputs)
    assert sum(len(set(output.tokens)) for output in outputs) > 5 * len(outputs)


@pytest.mark.parametrize(("name", "block_size"), [("v3", 128), ("v3", 16), ("v2", 64), ("odd", 32)])
def test_as_hugging_face(
    plugin: EngineProcess, deepseek: Any, want: Any, name: str, block_size: int
) -> None:
    answer = plugin.run(settings(deepseek(name), block_size=block_size), RUN)
    assert_is_plugin(answer, block_size)
    assert_same(want(name), answer.outputs(), tolerance=5e-4)


def test_the_reference_gives_the_same(plugin: EngineProcess, deepseek: Any, want: Any) -> None:
    config = {"ops": {"implementation": "reference"}}
    answer = plugin.run(settings(deepseek("v3"), additional_config=config), RUN)
    assert_is_plugin(answer, implementation="reference")
    assert_same(want("v3"), answer.outputs(), tolerance=5e-4)


@pytest.mark.parametrize("more", [{}, INT8], ids=["float32", "int8"])
def test_prefix_cache_hits(plugin: EngineProcess, deepseek: Any, more: dict[str, Any]) -> None:
    shared = tokens(330, seed=1)
    first = [shared + tokens(10, seed=2), tokens(200, seed=3)]
    again = [shared + tokens(n, seed=n) for n in (1, 40, 90)] + [shared[:200] + tokens(9), first[1]]
    runs = [{"prompts": prompts, "max_tokens": 24} for prompts in (first, again, again)]
    engine = settings(deepseek("v3"), block_size=16, **more)
    fresh = plugin.run(engine | {"enable_prefix_caching": False}, *runs[:2])
    answer = plugin.run(engine | {"enable_prefix_caching": True}, *runs)
    for run, same in ((0, 0), (1, 1), (2, 1)):
        assert_same(fresh.outputs(same), answer.outputs(run), tolerance=5e-4)
    assert [output.cached for output in answer.outputs(0)] == [0, 0]
    assert [output.cached for output in answer.outputs(1)] == [320, 320, 320, 192, 192]


def test_preemption_and_reused_blocks(plugin: EngineProcess, deepseek: Any) -> None:
    prompts = [tokens(60 + 7 * i, seed=i) for i in range(16)]
    runs = [{"prompts": prompts, "max_tokens": 60}, {"prompts": prompts[::-1], "max_tokens": 60}]
    engine = settings(deepseek("v3"), enable_prefix_caching=False, block_size=16)
    roomy = plugin.run(engine, *runs)
    answer = plugin.run(engine | {"max_model_len": 1024, "num_gpu_blocks_override": 70}, *runs)
    assert answer.metrics["vllm:num_preemptions"] > 5
    for run in (0, 1):
        assert_same(roomy.outputs(run), answer.outputs(run), tolerance=5e-4)


def test_speculation_verifies_drafts(plugin: EngineProcess, deepseek: Any, want: Any) -> None:
    """Several query tokens of a sequence in one step give the same tokens."""
    repeated = [tokens(20, seed=i) * 6 for i in range(6)]
    run = {"prompts": [*repeated, *PROMPTS], "max_tokens": 16}
    plain = plugin.run(settings(deepseek("v3")), run)
    ngram = {"method": "ngram", "num_speculative_tokens": 6, "prompt_lookup_max": 3}
    ngram["prompt_lookup_min"] = 1
    answer = plugin.run(settings(deepseek("v3"), speculative_config=ngram), run)
    assert answer.metrics["vllm:spec_decode_num_draft_tokens"] > 50
    assert first_differences(plain.outputs(), answer.outputs()) == []
    assert first_differences(want("v3"), answer.outputs()[len(repeated) :]) == []


@pytest.mark.slow
def test_compiled(plugin: EngineProcess, deepseek: Any, want: Any) -> None:
    answer = plugin.run(settings(deepseek("v3"), compilation_config={"mode": 3}), RUN)
    assert_is_plugin(answer)
    assert "DYNAMO_TRACE_ONCE" in answer.log
    assert_same(want("v3"), answer.outputs(), tolerance=5e-4)


SCORE = {"prompts": PROMPTS[2::3], "score": True}


def _mean_difference(one: list[list[float]], two: list[list[float]]) -> float:
    pairs = [p for both in zip(one, two, strict=True) for p in zip(*both, strict=True)]
    return sum(abs(a - b) for a, b in pairs) / len(pairs)


def test_the_errors_of_other_types(plugin: EngineProcess, deepseek: Any) -> None:
    """Int8 latents cost no more than running the model in bfloat16, float16 little."""
    model = deepseek("v3")
    exact = plugin.run(settings(model), SCORE).runs[0]["scores"]

    def error(dtype: str = "float32", **more: Any) -> float:
        answer = plugin.run(settings(model, **more) | {"dtype": dtype}, SCORE)
        return _mean_difference(exact, answer.runs[0]["scores"])

    half = error("bfloat16")
    assert 0 < error("float16") < half / 2
    assert 0 < error(**INT8) < half
    assert 0 < error("bfloat16", **INT8) < 2 * half  # 16-bit products of integers
    fast = {"kv_cache": {"precision": "fast"}}
    assert 0 < error("bfloat16", additional_config=fast, **INT8) < 2 * half


def test_int8_is_counted(plugin: EngineProcess, deepseek: Any) -> None:
    answer = plugin.run(settings(deepseek("v3"), **INT8), RUN)
    assert_is_plugin(answer, backend="AscendCPUMLABackendC8D", dtype="torch.int8")
    rows, saturated, *_ = answer.counters["c8d"]
    assert rows >= 2 * sum(map(len, PROMPTS))  # layers, less what the prefix cache had
    assert not saturated


def test_static_scales_of_modelslim(plugin: EngineProcess, deepseek: Any, tmp_path: Path) -> None:
    model = deepseek("v3")
    exact = plugin.run(settings(model), SCORE).runs[0]["scores"]
    fitting = write_with_scales(tmp_path / "fitting", model, 4.0 / 127)
    answer = plugin.run(settings(fitting, **INT8), SCORE)
    assert_is_plugin(answer, backend="AscendCPUMLABackendC8S", dtype="torch.int8")
    fitted = _mean_difference(exact, answer.runs[0]["scores"])
    assert fitted > 0
    # A scale that cuts every latent off is seen in the answers, and counted.
    small = write_with_scales(tmp_path / "small", model, 0.1 / 127)
    cut = plugin.run(settings(small, **INT8), SCORE)
    assert _mean_difference(exact, cut.runs[0]["scores"]) > 2 * fitted
    assert cut.counters["c8s"][1] > 0.9 * cut.counters["c8s"][0] > 0
