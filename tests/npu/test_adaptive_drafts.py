"""Speculation that pays, on the NPU: a number of drafts that changes, and drafts of few tokens."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from engines import Answer, EngineProcess
from npu_engines import NPUModels, assert_near, on_the_cpu, settings
from prompts import tokens

from ascend_plugin.spec_decode.token_order import TokenOrder, save_order

pytestmark = pytest.mark.engine

MTP = {"speculative_config": {"method": "mtp", "num_speculative_tokens": 3}}
#: Drafts of steps; pauses in which the layer does not run.
SCRIPT = (2, 2, 0, 0, 0, 3, 1)
#: One prompt is prefilled in two chunks.
PROMPTS = [tokens(count, seed=count) for count in (7, 30, 61, 150)]
RUN = {"prompts": PROMPTS, "max_tokens": 40, "script": SCRIPT}


@pytest.fixture(scope="module")
def model(models: NPUModels) -> str:
    return models("mimo", architecture="mimo", hidden=512, heads=4)


def engine(model: str, graphs: str = "eager", **speculation: Any) -> dict[str, Any]:
    config = {"speculation": {"adaptive": True, **speculation}}
    return settings(model, graphs, additional_config=config, **MTP)


def accepted(answer: Answer) -> float:
    """Return how many drafts a proposal got accepted on average."""
    found = answer.runs[0]["drafts"]
    return found["accepted_tokens"] / found["drafts"]


@pytest.mark.parametrize("graphs", ["eager", "piecewise"])
def test_the_number_of_drafts_changes(
    npu: EngineProcess, cpu: EngineProcess, model: str, graphs: str
) -> None:
    """A key that was not written later would be missed: drafts would be refused more often."""
    plain = npu.run(settings(model), {"prompts": PROMPTS, "max_tokens": 40})
    answer = npu.run(engine(model, graphs), RUN)
    assert_near(plain.outputs(), answer.outputs())
    wanted = cpu.run(on_the_cpu(engine(model)), RUN)
    assert accepted(answer) == pytest.approx(accepted(wanted), rel=0.25)
    assert accepted(answer) > 0.7


def test_graphs_of_whole_steps_are_refused(npu: EngineProcess, model: str) -> None:
    with pytest.raises(RuntimeError, match=r"adaptive=true cannot be served: graphs of whole"):
        npu.run(engine(model, "full"), RUN)


def test_drafts_among_few_tokens(npu: EngineProcess, model: str, tmp_path: Path) -> None:
    size = json.loads((Path(model) / "config.json").read_text())["vocab_size"]
    file = tmp_path / "head.safetensors"
    save_order(file, TokenOrder(torch.arange(0, size, 2).int(), size), {})
    run = {"prompts": PROMPTS, "max_tokens": 40}
    plain = npu.run(settings(model), run)
    head = {"draft_head": {"file": str(file)}, "adaptive": False}
    answer = npu.run(engine(model, **head), run)
    assert "Drafts are chosen among" in answer.log
    assert_near(plain.outputs(), answer.outputs())
    assert accepted(answer) > 0.2
