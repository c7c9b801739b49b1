"""Multi-token prediction on latent attention (MLA) on an NPU: a tiny DeepSeek-V3's draft layer.

The base and the draft layer have pages of latents each, and experts in groups.
"""

from __future__ import annotations

from typing import Any

import pytest
from deepseek_mtp import LAYERS, write_deepseek_mtp
from engines import EngineProcess
from mtp_cases import accepted_share, mtp
from npu_engines import assert_identical, assert_near, on_the_cpu, settings
from prompts import tokens
from tiny_deepseek import NPU_LATENTS, write_with_scales

pytestmark = pytest.mark.engine

DRAFTS = 3
#: One prompt is prefilled in four chunks; another one continues it, from the prefix cache.
PROMPTS = [tokens(count, seed=count) for count in (7, 30, 61, 300)]
RUN = {"prompts": PROMPTS, "max_tokens": 50}
AGAIN = {"prompts": [[*PROMPTS[-1], 11, 12], tokens(20, seed=2)], "max_tokens": 30}

#: What is close in logprobs, by type: experts that are nearly as good as each other change more
#: than a rounding does.
TIES = {"bfloat16": 0.3, "float16": 0.07}
#: How far shares of accepted drafts are from the CPU's; bfloat16 decides otherwise in many steps.
SHARES = {"bfloat16": 0.25, "float16": 0.08}
INT8 = {"kv_cache_dtype": "int8_per_token_head"}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_deepseek_mtp(tmp_path_factory.mktemp("deepseek") / "mtp", **NPU_LATENTS)


def sizes(count: int) -> list[int]:
    """Captured sizes: all are whole numbers of verifications, some batches are padded."""
    return [sequences * (1 + count) for sequences in (1, 2, 4)]


def full(engine: dict[str, Any], count: int = DRAFTS) -> dict[str, Any]:
    """The same with captured decode and verification steps."""
    plain = {name: value for name, value in engine.items() if name != "enforce_eager"}
    steps = {"cudagraph_mode": "FULL_DECODE_ONLY", "cudagraph_capture_sizes": sizes(count)}
    return {**plain, "compilation_config": {"mode": 0, **steps}}


@pytest.mark.parametrize("dtype", TIES)
def test_tokens_and_drafts_are_those_of_the_cpu(
    npu: EngineProcess, cpu: EngineProcess, model: str, dtype: str
) -> None:
    """Drafts too: a key at a wrong place or of a rejected token would be refused more often."""
    plain = settings(model, dtype=dtype)
    drafting = plain | mtp(DRAFTS)
    without = npu.run(plain, RUN, AGAIN)
    answer = npu.run(drafting, RUN, AGAIN)
    wanted = cpu.run(on_the_cpu(drafting), RUN, AGAIN)
    assert answer.made_of["backends"] == ["AscendNPUMLABackend"]
    assert wanted.made_of["backends"] == ["AscendCPUMLABackend"]
    assert answer.outputs(1)[0].cached == 128
    for run in range(2):
        assert_near(without.outputs(run), answer.outputs(run), tie=TIES[dtype])
        assert_near(wanted.outputs(run), answer.outputs(run), tie=TIES[dtype])
    assert accepted_share(answer) == pytest.approx(accepted_share(wanted), rel=SHARES[dtype])
    assert accepted_share(answer) > 0.6


@pytest.mark.parametrize("count", [1, DRAFTS, 15])
def test_verification_is_captured_once(npu: EngineProcess, model: str, count: int) -> None:
    """Batches of 1 + count rows each, up to what one pass verifies."""
    eager = npu.run(settings(model) | mtp(count), RUN, AGAIN)
    captured = full(settings(model) | mtp(count), count)
    first = npu.run(captured, RUN, AGAIN)
    for run in range(2):
        assert_identical(eager.outputs(run), first.outputs(run))
        assert eager.runs[run]["drafts"] == first.runs[run]["drafts"]
    graphs = dict(first.made_of["graphs"])
    assert graphs["captures"] == len(sizes(count))
    # The draft layer runs eagerly.
    assert graphs["task_groups"] == len(sizes(count)) * LAYERS
    assert graphs["replays"] > 0
    assert graphs["updates"] == graphs["replays"] * LAYERS
    other = {"prompts": [tokens(n, seed=n + 1) for n in (20, 61)], "max_tokens": 12}
    again = npu.run(captured, other).made_of["graphs"]
    assert again["captures"] == graphs["captures"]
    assert again["replays"] > graphs["replays"]


@pytest.mark.parametrize("fault", ["stale keys", "late embedding"])
def test_a_fault_of_drafting_shows(
    npu: EngineProcess, cpu: EngineProcess, model: str, fault: str
) -> None:
    """Tokens stay right, so only the share of accepted drafts can tell."""
    plain = settings(model, dtype="float16", enable_prefix_caching=False)
    without = npu.run(plain, RUN)
    wanted = cpu.run(on_the_cpu(plain | mtp(DRAFTS)), RUN)
    answer = npu.run(full(plain | mtp(DRAFTS)), RUN | {"fault": fault}, RUN)
    for run in range(2):
        assert_near(without.outputs(), answer.outputs(run), tie=TIES["float16"])
    right, allowed = accepted_share(wanted), SHARES["float16"]
    broken, mended = (
        run["drafts"]["accepted_tokens"] / run["drafts"]["drafts"] for run in answer.runs
    )
    assert mended == pytest.approx(right, rel=allowed)
    assert broken < (1 - 1.5 * allowed) * right


@pytest.fixture(scope="module")
def scaled(model: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The model with static scales of its latents."""
    return write_with_scales(tmp_path_factory.mktemp("scaled") / "mtp", model, 4.0 / 127)


@pytest.mark.parametrize("graphs", ["eager", "full and piecewise"])
@pytest.mark.parametrize("variant", ["c8d", "c8s"])
def test_int8_latents(
    npu: EngineProcess, cpu: EngineProcess, model: str, scaled: str, variant: str, graphs: str
) -> None:
    """The draft layer's pages are c8d beside both; whole steps are not captured."""
    path = scaled if variant == "c8s" else model
    half = INT8 | {"dtype": "float16"}  # bfloat16's own noise would hide the codes'
    plain = npu.run(settings(path, **half), RUN, AGAIN)
    answer = npu.run(settings(path, graphs, **half) | mtp(DRAFTS), RUN, AGAIN)
    wanted = cpu.run(on_the_cpu(settings(path, **half) | mtp(DRAFTS)), RUN, AGAIN)
    names = sorted({f"AscendNPUMLABackend{each}" for each in ("C8D", variant.upper())})
    assert answer.made_of["backends"] == names
    assert answer.made_of["dtypes"] == ["torch.int8"]
    layers = "1 layers c8d, 2 layers c8s." if variant == "c8s" else "3 layers c8d."
    assert f"int8 KV cache of latents: {layers}" in answer.log
    assert answer.outputs(1)[0].cached == 128
    for run in range(2):
        assert_near(plain.outputs(run), answer.outputs(run), tie=TIES["float16"])
        assert_near(wanted.outputs(run), answer.outputs(run), tie=TIES["float16"])
    shares = (accepted_share(answer), accepted_share(wanted))
    assert shares[0] == pytest.approx(shares[1], rel=SHARES["float16"])
    assert shares[0] > 0.6
    assert answer.made_of["graphs"]["task_groups"] == 0
    assert (answer.made_of["graphs"]["replays"] > 0) == (graphs != "eager")
