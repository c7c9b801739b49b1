"""Which steps are recorded, and when they are recorded anew."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from vllm.config import CompilationMode
from vllm.forward_context import override_forward_context

from ascend_plugin.attention.cpu import AscendCPUMetadata
from ascend_plugin.graph.cpu import Pool
from ascend_plugin.worker import cpu_steps
from ascend_plugin.worker.cpu_steps import MAX_TOKENS, RecordedSteps, refusal

BUFFER = torch.zeros(64, 8)
IDS = torch.zeros(64, dtype=torch.int32)


def _context(tokens: int, **more: Any) -> SimpleNamespace:
    ints = torch.zeros(tokens + 1, dtype=torch.int32)
    table = torch.zeros(tokens, 4, dtype=torch.int32)
    batch = AscendCPUMetadata(tokens, ints, ints[1:], table, True)
    fields = {"attn_metadata": {"layer": batch}, "slot_mapping": {"layer": ints[1:]}}
    return SimpleNamespace(**{**fields, **more})


@pytest.fixture
def steps() -> Iterator[RecordedSteps]:
    def forward(input_ids: torch.Tensor, hidden: torch.Tensor, scale: int = 1) -> torch.Tensor:
        return F.silu(hidden)

    with torch.inference_mode():
        yield RecordedSteps(forward, Pool())


def _run(steps: RecordedSteps, context: Any, tokens: int, **more: Any) -> torch.Tensor:
    with override_forward_context(context):
        out: torch.Tensor = steps(input_ids=IDS[:tokens], hidden=BUFFER[:tokens], **more)
    return out


def test_a_step_is_recorded_once_for_its_addresses(steps: RecordedSteps) -> None:
    context = _context(3)
    for value in (1.0, 2.0, -1.0):
        BUFFER.fill_(value)
        torch.testing.assert_close(_run(steps, context, 3), F.silu(BUFFER[:3]))
    assert (steps.recorded, steps.repeated) == (1, 2)
    _run(steps, _context(3), 3)  # other lengths and tables
    _run(steps, context, 2)
    _run(steps, context, 3, scale=2)
    assert (steps.recorded, steps.repeated) == (4, 2)
    steps.forget()
    _run(steps, context, 3)
    assert (steps.recorded, steps.repeated) == (5, 2)


def test_other_steps_run_as_always(steps: RecordedSteps) -> None:
    for context, tokens in (
        (_context(MAX_TOKENS + 1), MAX_TOKENS + 1),
        (_context(3, attn_metadata=None), 3),
        (_context(3, attn_metadata={"layer": object()}), 3),
        (_context(3, slot_mapping=None), 3),
    ):
        torch.testing.assert_close(_run(steps, context, tokens), F.silu(BUFFER[:tokens]))
    assert (steps.recorded, steps.repeated, steps.given_up) == (0, 0, None)


def test_calls_by_position_pass(steps: RecordedSteps) -> None:
    with override_forward_context(_context(3)):
        got = steps(IDS[:3], BUFFER[:3], scale=2)
    torch.testing.assert_close(got, F.silu(BUFFER[:3]))
    assert (steps.recorded, steps.given_up) == (0, None)


def test_addresses_that_never_stay_end_it(
    steps: RecordedSteps, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cpu_steps, "MAX_STEPS", 3)
    contexts = [_context(2) for _ in range(5)]
    for context in contexts:
        torch.testing.assert_close(_run(steps, context, 2), F.silu(BUFFER[:2]))
    assert steps.recorded == 3
    assert steps.given_up is not None
    assert "more than 3 kinds" in steps.given_up


CONFIG = {
    "model_config": SimpleNamespace(enforce_eager=False, runner_type="generate"),
    "compilation_config": SimpleNamespace(mode=CompilationMode.NONE),
    "parallel_config": SimpleNamespace(world_size=1),
    "lora_config": None,
    "kv_transfer_config": None,
}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_config": SimpleNamespace(enforce_eager=True, runner_type="generate")}, "eager"),
        ({"model_config": SimpleNamespace(enforce_eager=False, runner_type="pooling")}, "embeds"),
        (
            {"compilation_config": SimpleNamespace(mode=CompilationMode.DYNAMO_TRACE_ONCE)},
            "torch.compile",
        ),
        ({"parallel_config": SimpleNamespace(world_size=2)}, "processes"),
        ({"lora_config": object()}, "LoRA"),
        ({"kv_transfer_config": object()}, "layer by layer"),
    ],
)
def test_engines_whose_steps_are_not_recorded(change: dict[str, Any], message: str) -> None:
    assert refusal(SimpleNamespace(**CONFIG)) is None
    reason = refusal(SimpleNamespace(**{**CONFIG, **change}))
    assert reason is not None
    assert message in reason
