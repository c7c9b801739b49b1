"""Steps of a scheduler, timed and counted for the policy, and what is told of its decisions."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry, generate_latest

from ascend_plugin.metrics_folder import FOLDER_VARIABLE
from ascend_plugin.spec_decode.choice import DraftChoice
from ascend_plugin.spec_decode.metrics import DraftGauges, read_choices, register_collector
from ascend_plugin.spec_decode.policy import Step


class Clock:
    """Time that passes when it is told to."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


class Seen(DraftChoice):
    """Keeps what the policy learns, and dictates what it answers."""

    def __init__(self, clock: Clock, limits: list[int] | None = None) -> None:
        super().__init__(3, limits, "a model", clock)
        self.steps: list[Step] = []
        self.clock, self.next = clock, 0
        observe = self.policy.observe
        self.policy.observe = lambda step: (self.steps.append(step), observe(step))[0]
        self.policy.choose = lambda batch: self.next

    def step(
        self, drafts: int, tokens: dict[str, int], proposals: dict[str, int], seconds: float = 0.5
    ) -> None:
        """Play a step: drafts to make, tokens that requests got, drafts that were verified."""
        from vllm.v1.core.sched.output import SchedulerOutput
        from vllm.v1.outputs import ModelRunnerOutput

        self.begin()
        self.next = drafts
        assert self[len(tokens)] <= drafts
        scheduled = SchedulerOutput.make_empty()
        scheduled.num_scheduled_tokens = {n: 1 + proposals.get(n, 0) for n in tokens}
        scheduled.scheduled_spec_decode_tokens = {n: [7] * c for n, c in proposals.items() if c}
        places = {name: i for i, name in enumerate(tokens)}
        output = ModelRunnerOutput(list(tokens), places, [[5] * n for n in tokens.values()])
        self.clock.now += seconds
        self.end(scheduled, output)
        self.clock.now += seconds / 5
        self.drafted()
        self.clock.now += 100  # nobody asks for anything


@pytest.fixture
def choice() -> Seen:
    return Seen(Clock())


def test_what_the_policy_learns(choice: Seen) -> None:
    choice.step(0, {"a": 1, "b": 1}, {})
    choice.step(2, {"a": 1, "b": 1}, {})
    choice.step(3, {"a": 3, "b": 1}, {"a": 2, "b": 2})
    choice.step(0, {"a": 4, "b": 2}, {"a": 3, "b": 3})
    choice.begin()
    assert [(s.batch, s.verified, s.drafted, s.accepted) for s in choice.steps] == [
        (2, 0, 0, ()),
        (2, 0, 2, ()),
        (2, 2, 3, (1, 1)),
        (2, 3, 0, (2, 1, 1)),
    ]
    assert [s.seconds for s in choice.steps] == pytest.approx([0.6] * 4), "the wait is not ours"
    assert choice.steps[3].tokens == 3


def test_steps_that_say_nothing(choice: Seen) -> None:
    """Chunks of prompts among them, drafts from before, and no request at all."""
    choice.step(2, {"a": 1, "b": 1}, {})
    choice.begin()
    assert len(choice.steps) == 1
    choice.step(0, {"a": 1}, {"a": 1})  # more than the step before made: there was none
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.outputs import EMPTY_MODEL_RUNNER_OUTPUT, ModelRunnerOutput

    choice.begin()
    prompt = SchedulerOutput.make_empty()
    prompt.num_scheduled_tokens = {"a": 1, "b": 40}
    choice.end(prompt, ModelRunnerOutput(["a", "b"], {"a": 0, "b": 1}, [[5], []]))
    choice.begin()
    choice.end(SchedulerOutput.make_empty(), EMPTY_MODEL_RUNNER_OUTPUT)
    choice.begin()
    assert len(choice.steps) == 1


def test_drafts_that_a_grammar_forbids_were_not_right(choice: Seen) -> None:
    choice.step(3, {"a": 1, "b": 1}, {})
    choice.step(3, {"a": 2, "b": 1}, {"a": 1, "b": 0})
    choice.begin()
    assert choice.steps[-1].verified == 3
    assert choice.steps[-1].accepted == (1, 0, 0)


def test_limits_by_batch_size() -> None:
    """Those of ``num_speculative_tokens_per_batch_size``; place 0 is unused."""
    choice = Seen(Clock(), [0, 3, 1, 0])
    choice.next = 2
    assert [choice[1], choice[2], choice[3]] == [2, 1, 0]


def test_a_change_is_logged_once_and_not_too_often(
    choice: Seen, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "ascend_plugin.spec_decode.choice")
    decided = [0]
    choice.policy.settled = lambda batch: decided[0]
    for decided[0], lines in ((0, 1), (0, 1), (3, 2), (3, 2)):
        choice.step(0, {"a": 1}, {})
        choice.begin()
        assert len(caplog.records) == lines
    assert caplog.records[1].message.startswith("Steps make 3 of 3 drafts (batch 1): ")
    decided[0], choice.clock.now = 1, choice.clock.now - 95
    choice._tell(1)
    assert len(caplog.records) == 2, "too soon"


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv(FOLDER_VARIABLE, str(tmp_path))
    return tmp_path


def test_metrics(folder: Path) -> None:
    gauges = DraftGauges("ünder", 2)
    for drafts in (0, 2, 2):
        gauges.count(drafts)
    gauges.set(2, 1.25)
    DraftGauges("b", 1)
    registry = CollectorRegistry()
    for _ in range(2):
        register_collector(registry)
    text = generate_latest(registry).decode()
    for line in (
        'speculation_drafts{model_name="ünder"} 2.0',
        'speculation_expected_speedup{model_name="ünder"} 1.25',
        'speculation_steps_total{drafts="0",model_name="ünder"} 1.0',
        'speculation_steps_total{drafts="2",model_name="ünder"} 2.0',
        'speculation_steps_total{drafts="1",model_name="b"} 0.0',
    ):
        assert text.count(f"ascend_plugin:{line}\n") == 1, text
    assert 'drafts="2",model_name="b"' not in text


def test_an_engine_counts_its_steps(folder: Path) -> None:
    choice = Seen(Clock())
    for _ in range(3):
        choice.step(2, {"a": 1}, {})
    (told,) = read_choices()
    assert (told.model, told.steps) == ("a model", (0, 0, 3, 0))


def test_without_a_folder_nothing_is_shared(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(FOLDER_VARIABLE, raising=False)
    DraftGauges("model", 3).count(1)
    assert read_choices() == []
