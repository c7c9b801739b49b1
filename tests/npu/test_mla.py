"""Latent attention (MLA) on an NPU: the CPU platform's tokens of tiny DeepSeek models."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import pytest
from engines import Answer, EngineProcess
from npu_engines import CAPTURED, GRAPHS, assert_identical, assert_near, on_the_cpu, settings
from prompts import tokens
from tiny_deepseek import NPU_LATENTS, write_tiny_deepseek, write_with_scales

pytestmark = pytest.mark.engine

LAYERS, STEPS = 2, 10

#: A dense layer, and one with groups of experts, of which some are kept.
MODELS: dict[str, dict[str, Any]] = {
    "v3": {"version": "v3", "n_routed_experts": 16, "n_group": 4, "topk_group": 2},
    "v2": {
        "version": "v2",
        "n_routed_experts": 8,
        "n_group": 2,
        "topk_group": 1,
        "topk_method": "group_limited_greedy",
    },
}

#: Some are prefilled in several chunks; the last one continues the one before it.
LENGTHS = (7, 39, 150, 300)


def runs() -> list[dict[str, Any]]:
    prompts = [tokens(count, seed=count) for count in LENGTHS]
    more = [*prompts[-1], 11, 12]
    return [
        {"prompts": prompts, "max_tokens": STEPS},
        {"prompts": [more], "max_tokens": STEPS},
    ]


@pytest.fixture(scope="module")
def deepseek(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], str]:
    """Write tiny models by name, when first asked for."""
    folder = tmp_path_factory.mktemp("deepseek")

    def write(name: str) -> str:
        path: Path = folder / name
        if path.exists():
            return str(path)
        return write_tiny_deepseek(path, **NPU_LATENTS, **MODELS[name])

    return write


@pytest.fixture(scope="module")
def eager(npu: EngineProcess, deepseek: Callable[[str], str]) -> Answer:
    return npu.run(settings(deepseek("v3")), *runs())


#: What is close in logprobs, by type: experts that are nearly as good as each other change more
#: than a rounding does.
TIES = {"bfloat16": 0.3, "float16": 0.07}


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("dtype", TIES)
def test_eager_tokens_are_those_of_the_cpu(
    npu: EngineProcess, cpu: EngineProcess, deepseek: Callable[[str], str], name: str, dtype: str
) -> None:
    engine = settings(deepseek(name)) | {"dtype": dtype}
    wanted, got = cpu.run(on_the_cpu(engine), *runs()), npu.run(engine, *runs())
    assert got.made_of["platform"] == "AscendNPUPlatform"
    assert got.made_of["backends"] == ["AscendNPUMLABackend"]
    assert got.made_of["block_sizes"] == [128]
    assert wanted.made_of["backends"] == ["AscendCPUMLABackend"]
    for run in range(2):
        assert_near(wanted.outputs(run), got.outputs(run), tie=TIES[dtype])
    assert [output.cached for output in got.outputs(1)] == [256]


def _difference(one: Answer, two: Answer) -> float:
    """The median: an expert that is nearly as good as another changes single tokens a lot."""
    scores = zip(one.runs[0]["scores"], two.runs[0]["scores"], strict=True)
    return median(abs(a - b) for both in scores for a, b in zip(*both, strict=True))


@pytest.mark.parametrize("name", MODELS)
def test_scores_are_as_good_as_those_of_the_cpu(
    npu: EngineProcess, cpu: EngineProcess, deepseek: Callable[[str], str], name: str
) -> None:
    """The logprobs of whole prompts are as far from float32's as the CPU's of the same type."""
    engine, run = settings(deepseek(name)), {"prompts": runs()[0]["prompts"], "score": True}
    exact = cpu.run(on_the_cpu(engine) | {"dtype": "float32"}, run)
    for dtype in TIES:
        typed = engine | {"dtype": dtype}
        allowed = _difference(exact, cpu.run(on_the_cpu(typed), run))
        assert _difference(exact, npu.run(typed, run)) < 1.25 * allowed


@pytest.mark.parametrize("graphs", [name for name in GRAPHS if name != "eager"])
def test_graphs_give_the_tokens_of_the_eager_engine(
    npu: EngineProcess, deepseek: Callable[[str], str], eager: Answer, graphs: str
) -> None:
    answer = npu.run(settings(deepseek("v3"), graphs), *runs())
    for run in range(2):
        assert_identical(eager.outputs(run), answer.outputs(run))
    counts = answer.made_of["graphs"]
    full, pieces = "full" in graphs, "piecewise" in graphs
    sizes = len(CAPTURED)
    assert counts["captures"] == sizes * (full + pieces * (LAYERS + 1))
    # One task group for each layer of each whole graph: with none, lengths would freeze.
    assert counts["task_groups"] == full * sizes * LAYERS
    if graphs == "full":
        assert counts["updates"] == counts["replays"] * LAYERS
    assert counts["replays"] > 0
    assert full == (counts["updates"] > 0)


@pytest.mark.parametrize("graphs", ["eager", "full", "full and piecewise"])
def test_drafts_do_not_change_answers(
    npu: EngineProcess, deepseek: Callable[[str], str], graphs: str
) -> None:
    # Alone, so that its verification is a uniform batch whenever there are drafts.
    run = {"prompts": [tokens(6, seed=3) * 8], "max_tokens": 24}
    plain = npu.run(settings(deepseek("v3")), run)
    drafting = {
        "method": "ngram",
        "num_speculative_tokens": 3,
        "prompt_lookup_max": 3,
        "prompt_lookup_min": 1,
    }
    answer = npu.run(settings(deepseek("v3"), graphs, speculative_config=drafting), run)
    assert_near(plain.outputs(), answer.outputs(), tie=TIES["bfloat16"])
    assert answer.metrics["vllm:spec_decode_num_draft_tokens"] > 0
    if graphs != "eager":
        assert answer.made_of["graphs"]["updates"] > 0


@pytest.mark.parametrize("graphs", ["eager", "full"])
def test_preemption_and_reused_blocks(
    npu: EngineProcess, deepseek: Callable[[str], str], graphs: str
) -> None:
    """Blocks of 16, of which there are too few for all: some sequences are computed again."""
    prompts = [tokens(30 + 7 * i, seed=i) for i in range(8)]
    run = {"prompts": prompts, "max_tokens": 30}
    engine = settings(deepseek("v3"), graphs, block_size=16, enable_prefix_caching=False)
    engine |= {"max_model_len": 256}
    roomy = npu.run(engine, run)
    answer = npu.run(engine | {"num_gpu_blocks_override": 24}, run)
    assert answer.metrics["vllm:num_preemptions"] > 0
    assert_near(roomy.outputs(), answer.outputs(), tie=TIES["bfloat16"])


INT8 = {"kv_cache_dtype": "int8_per_token_head"}


@pytest.mark.parametrize("graphs", ["eager", "full and piecewise"])
def test_int8_latents(
    npu: EngineProcess,
    cpu: EngineProcess,
    deepseek: Callable[[str], str],
    eager: Answer,
    graphs: str,
) -> None:
    """The CPU platform's answers; whole steps are not captured: pages are dequantised first."""
    engine = settings(deepseek("v3"), graphs, **INT8)
    wanted, got = cpu.run(on_the_cpu(engine), *runs()), npu.run(engine, *runs())
    assert got.made_of["backends"] == ["AscendNPUMLABackendC8D"]
    assert got.made_of["dtypes"] == ["torch.int8"]
    for run in range(2):
        assert_near(wanted.outputs(run), got.outputs(run), tie=TIES["bfloat16"])
    assert [output.cached for output in got.outputs(1)] == [256]
    assert got.made_of["graphs"]["task_groups"] == 0
    assert (got.made_of["graphs"]["replays"] > 0) == (graphs != "eager")


def test_static_scales_of_modelslim(
    npu: EngineProcess, cpu: EngineProcess, deepseek: Callable[[str], str], tmp_path: Path
) -> None:
    model = write_with_scales(tmp_path / "scaled", deepseek("v3"), 4.0 / 127)
    half = settings(model) | {"dtype": "float16"}  # bfloat16's own noise would hide the codes'
    run = {"prompts": runs()[0]["prompts"], "score": True}
    wanted, got = cpu.run(on_the_cpu(half | INT8), run), npu.run(half | INT8, run)
    assert got.made_of["backends"] == ["AscendNPUMLABackendC8S"]
    # Nearer to the same codes on the CPU than those are to no quantisation.
    plain = cpu.run(on_the_cpu(half), run)
    assert _difference(wanted, got) < 0.5 * _difference(wanted, plain)
