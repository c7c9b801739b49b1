"""Multi-token prediction on latent attention: a tiny DeepSeek-V3 with a draft layer.

Pages of latents of the model and of the draft layer, experts in groups, and hidden states that are
recycled after the norm of the layer's head: what ``test_mtp.py`` has for dense models.
"""

from __future__ import annotations

from pathlib import Path

import pytest
from byte_tokenizer import write_tokenizer
from deepseek_mtp import OfflineDeepseekMTP, write_deepseek_mtp
from engines import EngineProcess, Output, assert_same, first_differences
from mtp_cases import (
    LONGEST,
    RUN,
    TOKENS,
    accepted_share,
    check_bfloat16,
    counted,
    cut,
    expected,
    mtp,
)
from prompts import tokens
from tiny_deepseek import generate, write_with_scales
from tiny_engines import settings

pytestmark = pytest.mark.engine

INT8 = {"kv_cache_dtype": "int8_per_token_head"}
#: How far two ways to add up logprobs in float32 may be apart.
TOLERANCE = 5e-4


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_deepseek_mtp(tmp_path_factory.mktemp("deepseek") / "mtp")


@pytest.fixture(scope="module")
def offline(model: str) -> OfflineDeepseekMTP:
    return OfflineDeepseekMTP(model)


@pytest.fixture(scope="module")
def greedy(plugin: EngineProcess, model: str) -> list[Output]:
    """What the model says without speculation, some tokens more than are compared."""
    run = RUN | {"max_tokens": TOKENS + LONGEST + 1}
    return plugin.run(settings(model, block_size=16), run).outputs()


@pytest.fixture(scope="module")
def want(greedy: list[Output]) -> list[Output]:
    """The same, as many tokens as are compared."""
    return cut(greedy, TOKENS)


def test_as_hugging_face(model: str, want: list[Output]) -> None:
    """Experts are chosen in groups, with a correction; the draft layer is left out."""
    assert_same(generate(model, RUN["prompts"], TOKENS), want, tolerance=TOLERANCE)


@pytest.mark.parametrize("count", [1, 2, 3, 4])
def test_tokens_and_drafts(
    plugin: EngineProcess,
    model: str,
    offline: OfflineDeepseekMTP,
    greedy: list[Output],
    want: list[Output],
    count: int,
) -> None:
    """Every token is that of decoding without drafts; every draft is what the layer must draft."""
    answer = plugin.run(settings(model, block_size=16, **mtp(count)), RUN)
    assert answer.made_of["backends"] == ["AscendCPUMLABackend"]
    assert_same(want, answer.outputs(), tolerance=TOLERANCE)
    found = counted(answer.runs[0], count)
    assert found == expected(offline, greedy, count)
    assert 0.3 * found.proposals < found.accepted[0] < 0.9 * found.proposals


#: Two of these prompts are prefilled in chunks; then there are steps that only verify.
FEW = RUN | {"prompts": RUN["prompts"][:7]}


@pytest.mark.parametrize(
    "fault", ["stale keys", "late embedding", "same position", "last token of the prompt"]
)
def test_a_fault_of_drafting_shows(
    plugin: EngineProcess,
    model: str,
    offline: OfflineDeepseekMTP,
    greedy: list[Output],
    want: list[Output],
    fault: str,
) -> None:
    """Tokens stay right, so only the count of accepted drafts can tell."""
    engine = settings(model, block_size=16, enable_prefix_caching=False, **mtp(LONGEST))
    answer = plugin.run(engine, FEW | {"fault": fault}, FEW)
    right = expected(offline, greedy[:7], LONGEST, FEW)
    assert_same(want[:7], answer.outputs(), tolerance=TOLERANCE)
    assert counted(answer.runs[0], LONGEST) != right
    assert counted(answer.runs[1], LONGEST) == right


SHARED = tokens(130, seed=1)
FIRST = [SHARED + tokens(10, seed=2), tokens(90, seed=3)]
AGAIN = [SHARED + tokens(n, seed=n) for n in (1, 20, 40)] + [SHARED[:90] + tokens(9), FIRST[1]]
CROWD = [tokens(60 + 7 * i, seed=i) for i in range(14)]
RUNS = [{"prompts": prompts, "max_tokens": 50} for prompts in (FIRST, AGAIN, CROWD, AGAIN)]
TIGHT = {"block_size": 16, "max_model_len": 512, "num_gpu_blocks_override": 44}


def test_drafts_from_cached_pages(
    plugin: EngineProcess, model: str, offline: OfflineDeepseekMTP
) -> None:
    """The draft layer's pages of another request are as good as those that it writes itself."""
    longer = [run | {"max_tokens": run["max_tokens"] + LONGEST + 1} for run in RUNS[:2]]
    plain = plugin.run(settings(model, block_size=16, enable_prefix_caching=False), *longer)
    answer = plugin.run(settings(model, block_size=16, **mtp(LONGEST)), *RUNS[:2], RUNS[1])
    assert all(output.cached >= 64 for output in answer.outputs(1))
    for run, same in ((0, 0), (1, 1), (2, 1)):
        right = expected(offline, plain.outputs(same), LONGEST, RUNS[same])
        assert counted(answer.runs[run], LONGEST) == right


@pytest.mark.parametrize("count", [1, 2, 3, 4])
def test_prefix_hits_and_preemption(plugin: EngineProcess, model: str, count: int) -> None:
    """Draft keys come from other requests' pages, and from pages that changed hands."""
    roomy = plugin.run(settings(model, block_size=16, enable_prefix_caching=False), *RUNS)
    answer = plugin.run(settings(model, enable_prefix_caching=True, **TIGHT, **mtp(count)), *RUNS)
    assert answer.metrics["vllm:num_preemptions"] > 2
    assert sum(output.cached > 90 for output in answer.outputs(1)) >= 3
    for i in range(len(RUNS)):
        assert_same(roomy.outputs(i), answer.outputs(i), tolerance=TOLERANCE)


@pytest.fixture(scope="module")
def scaled(model: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The model with static scales of its latents."""
    return write_with_scales(tmp_path_factory.mktemp("scaled") / "mtp", model, 4.0 / 127)


#: Logprobs of int8 caches differ so much where a code turns into its neighbour.
NEAR_TIE = 0.03


@pytest.mark.parametrize("count", [1, 2, 3, 4])
@pytest.mark.parametrize("variant", ["c8d", "c8s"])
def test_int8(plugin: EngineProcess, model: str, scaled: str, variant: str, count: int) -> None:
    """Int8 latents give their own tokens, from reused pages too; the draft layer's are c8d."""
    path = scaled if variant == "c8s" else model
    plain = plugin.run(settings(path, block_size=16, enable_prefix_caching=False, **INT8), *RUNS)
    engine = settings(path, enable_prefix_caching=True, **TIGHT, **INT8, **mtp(count))
    answer = plugin.run(engine, *RUNS)
    assert answer.made_of["dtypes"] == ["torch.int8"]
    assert set(answer.counters) == {"c8d", variant}
    assert answer.metrics["vllm:num_preemptions"] > 2
    assert accepted_share(answer) > 0.15
    for i in range(len(RUNS)):
        for difference in first_differences(plain.outputs(i), answer.outputs(i)):
            assert difference.margin < NEAR_TIE, difference


def test_bfloat16(plugin: EngineProcess, model: str) -> None:
    check_bfloat16(plugin, model)


def test_processed_logits(plugin: EngineProcess, model: str) -> None:
    """Penalties see the drafts before them, a grammar goes back behind rejected ones."""
    write_tokenizer(Path(model))
    named = settings(model, block_size=16) | {"skip_tokenizer_init": False}
    sampled = [
        RUN | {"sampling": sampling}
        for sampling in (
            {"repetition_penalty": 1.3, "presence_penalty": 0.8},
            {"structured_outputs": {"regex": "[ -~]{80}"}},
        )
    ]
    plain = plugin.run(named, *sampled)
    answer = plugin.run(named | mtp(3), *sampled)
    for i in range(len(sampled)):
        assert answer.runs[i]["drafts"]["accepted_tokens"] > 0
        assert first_differences(plain.outputs(i), answer.outputs(i)) == []
