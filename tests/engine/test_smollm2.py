"""The real small model: exact in float32, equal up to near-ties in bfloat16."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from engines import Answer, EngineProcess, assert_same, first_differences
from prompts import TEXTS

from ascend_plugin.mtp.checkpoint import attach

pytestmark = [pytest.mark.engine, pytest.mark.model]

RUN = {"prompts": list(TEXTS), "max_tokens": 32}

#: How clear a token may have been that narrow arithmetic turns into another (natural log).
NEAR_TIE = 0.2


def _settings(model: str, dtype: str, **more: Any) -> dict[str, Any]:
    return {
        "model": model,
        "dtype": dtype,
        "enforce_eager": True,
        "max_model_len": 2048,
        "max_num_batched_tokens": 256,
        "kv_cache_memory_bytes": 1 << 28,
        **more,
    }


@pytest.fixture(scope="module")
def exact(stock: EngineProcess, smollm2: str) -> Answer:
    """What stock vLLM says in float32."""
    return stock.run(_settings(smollm2, "float32"), RUN)


def test_float32(plugin: EngineProcess, smollm2: str, exact: Answer) -> None:
    answer = plugin.run(_settings(smollm2, "float32"), RUN)
    assert answer.made_of["backends"] == ["AscendCPUAttentionBackend"]
    assert_same(exact.outputs(), answer.outputs())


def test_float32_with_speculation(plugin: EngineProcess, smollm2: str, exact: Answer) -> None:
    ngram = {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 4}
    engine = _settings(smollm2, "float32", speculative_config=ngram)
    answer = plugin.run(engine, RUN)
    assert answer.metrics["vllm:spec_decode_num_accepted_tokens"] > 20
    assert_same(exact.outputs(), answer.outputs())


@pytest.fixture(scope="module")
def with_layer(smollm2: str, repository: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The model joined with the draft layer that is part of the repository."""
    layer = repository / "configs" / "mtp" / "smollm2-135m" / "layer.safetensors"
    folder = tmp_path_factory.mktemp("mtp") / "smollm2"
    attach(Path(smollm2), layer, folder)
    return str(folder)


def test_float32_with_its_draft_layer(
    plugin: EngineProcess, with_layer: str, exact: Answer
) -> None:
    """The same tokens, and more than a third of a draft per proposal is right."""
    mtp = {"method": "mtp", "num_speculative_tokens": 2}
    settings = {"speculation": {"adaptive": False}}
    engine = _settings(with_layer, "float32", speculative_config=mtp, additional_config=settings)
    answer = plugin.run(engine, RUN)
    assert_same(exact.outputs(), answer.outputs())
    drafts = answer.metrics["vllm:spec_decode_num_drafts"]
    assert answer.metrics["vllm:spec_decode_num_accepted_tokens"] > 0.35 * drafts


@pytest.mark.parametrize("change", [{}, {"block_size": 16}], ids=str)
def test_bfloat16(
    plugin: EngineProcess, stock: EngineProcess, smollm2: str, change: dict[str, Any]
) -> None:
    want = stock.run(_settings(smollm2, "bfloat16"), RUN).outputs()
    answer = plugin.run(_settings(smollm2, "bfloat16", **change), RUN)
    assert answer.made_of["dtypes"] == ["torch.bfloat16"]
    differences = first_differences(want, answer.outputs())
    print(f"{len(differences)} of {len(TEXTS)} completions differ: {differences}")
    assert all(difference.margin < NEAR_TIE for difference in differences)
    early = [difference for difference in differences if difference.step < 8]
    assert len(early) <= len(TEXTS) // 3


@pytest.mark.parametrize(
    "change", [{"dtype": "bfloat16"}, {"dtype": "float32", "kv_cache_dtype": "bfloat16"}], ids=str
)
def test_narrow_types_are_as_accurate_as_stock(
    plugin: EngineProcess, stock: EngineProcess, smollm2: str, change: dict[str, Any]
) -> None:
    """Logprobs of given text, against stock vLLM's in float32."""
    run = {"prompts": [text for text in TEXTS if len(text) > 200], "score": True}
    exact = stock.run(_settings(smollm2, "float32"), run).runs[0]["scores"]
    theirs = stock.run(_settings(smollm2, "bfloat16"), run).runs[0]["scores"]
    ours = plugin.run({**_settings(smollm2, "float32"), **change}, run)
    assert ours.made_of["dtypes"] == ["torch.bfloat16"]
    limit, error = _error(exact, theirs), _error(exact, ours.runs[0]["scores"])
    print(f"root mean square error of logprobs: stock {limit:.4f}, plugin {error:.4f}")
    assert error < 1.2 * limit


def _error(want: list[list[float]], got: list[list[float]]) -> float:
    """Root mean square difference of all scores."""
    pairs = [p for one in zip(want, got, strict=True) for p in zip(*one, strict=True)]
    assert len(pairs) > 600
    return (sum((a - b) ** 2 for a, b in pairs) / len(pairs)) ** 0.5
