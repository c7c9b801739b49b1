"""Drafts among frequent tokens: the tokens of decoding without drafts, and the drafts they must be.

``test_mtp_sampling.py`` draws with such a head.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from eagle import write_eagle
from engines import EngineProcess, Output, assert_same
from mtp_cases import LONGEST, MIMO, PROMPTS, RUN, TOKENS, counted, expected, mtp
from offline_mtp import OfflineMTP
from safetensors import safe_open
from tiny_engines import TinyModels, settings

from ascend_plugin.spec_decode.token_order import FILE, TokenOrder, save_order

pytestmark = pytest.mark.engine

#: What ends a text of the tiny models; a head keeps it, whatever its place.
END = 1


@pytest.fixture(scope="module")
def model(tiny: TinyModels) -> str:
    return tiny("mimo", **MIMO)


@pytest.fixture(scope="module")
def greedy(plugin: EngineProcess, model: str) -> list[Output]:
    run = {"prompts": PROMPTS, "max_tokens": TOKENS + LONGEST + 1}
    return plugin.run(settings(model, block_size=16), run).outputs()


@pytest.fixture(scope="module")
def want(greedy: list[Output]) -> list[Output]:
    cut = slice(TOKENS)
    return [Output(o.tokens[cut], o.logprobs[cut], o.margins[cut], o.cached) for o in greedy]


@pytest.fixture(scope="module")
def order(model: str) -> TokenOrder:
    """Every second token, so that about half of the drafts must change."""
    size = json.loads((Path(model) / "config.json").read_text())["vocab_size"]
    return TokenOrder(torch.arange(0, size, 2).int(), size)


def head(**settings: Any) -> dict[str, Any]:
    return {"additional_config": {"speculation": {"draft_head": settings}}}


@pytest.mark.parametrize("count", [1, 3])
def test_tokens_and_drafts(
    plugin: EngineProcess,
    model: str,
    order: TokenOrder,
    greedy: list[Output],
    want: list[Output],
    tmp_path: Path,
    count: int,
) -> None:
    """Tokens are those of decoding without drafts; drafts are the best of what is kept."""
    file = tmp_path / "head.safetensors"
    save_order(file, order, {})
    kept = order.kept(None, {END})
    engine = settings(model, block_size=16, **mtp(count), **head(file=str(file)))
    answer = plugin.run(engine, RUN)
    assert f"among {len(kept)} of {order.vocabulary} tokens" in answer.log
    assert_same(want, answer.outputs())
    found = counted(answer.runs[0], count)
    assert found == expected(OfflineMTP(model, kept), greedy, count)
    assert 0 < found.accepted[0] < expected(OfflineMTP(model), greedy, count).accepted[0]


def test_a_checkpoint_brings_its_own(
    plugin: EngineProcess, model: str, order: TokenOrder, want: list[Output], tmp_path: Path
) -> None:
    """What 'mtp train' wrote is used without a setting, can be made smaller, and left."""
    folder = tmp_path / "model"
    shutil.copytree(model, folder)
    with safe_open(folder / "model.safetensors", framework="pt") as weights:
        names = dict.fromkeys(weights.keys(), "model.safetensors")
    index = {"metadata": {}, "weight_map": names}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    save_order(folder / FILE, order, {})
    for more, told in (
        ({}, f"among {len(order.kept(None, {END}))} of"),
        (head(tokens=50), "among 51 of"),
        (head(tokens=0), None),
    ):
        answer = plugin.run(settings(str(folder), block_size=16, **mtp(2), **more), RUN)
        assert_same(want, answer.outputs())
        assert ("Drafts are chosen among" in answer.log) == (told is not None)
        assert told is None or told in answer.log


def test_eagle(
    plugin: EngineProcess, model: str, order: TokenOrder, want: list[Output], tmp_path: Path
) -> None:
    """A draft model of its own, which shares the target's projection."""
    draft = write_eagle(tmp_path / "draft", Path(model))
    file = tmp_path / "head.safetensors"
    save_order(file, order, {})
    eagle = {"method": "eagle", "model": str(draft), "num_speculative_tokens": 2}
    engine = settings(model, block_size=16, speculative_config=eagle, **head(file=str(file)))
    answer = plugin.run(engine, RUN)
    assert "Drafts are chosen among" in answer.log
    assert answer.runs[0]["drafts"]["accepted_tokens"] > 30
    assert_same(want, answer.outputs())
