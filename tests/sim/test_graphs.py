"""Captured graphs: replay respects edges only, updates reach it, and capture refuses."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import pytest
import torch

from ascend_plugin.ops.sim.runtime import Runtime

pytestmark = pytest.mark.timeout(120)


@pytest.fixture(autouse=True)
def idle():
    torch.npu.synchronize()
    yield
    torch.npu.synchronize()


def zeros(count: int = 4) -> torch.Tensor:
    made = torch.zeros(count, device="npu")
    torch.npu.synchronize()
    return made


@contextmanager
def refused(pattern: str) -> Iterator[None]:
    """A capture fails; the pattern is in its error or in the error that broke it off."""
    with pytest.raises(RuntimeError) as caught:
        yield
    error: BaseException | None = caught.value
    texts = []
    while error is not None:
        texts.append(str(error))
        error = error.__context__
    assert re.search(pattern, "\n".join(texts)), texts


def test_capture_computes_nothing_and_every_replay_does():
    x, y = zeros(), zeros()
    graph = torch.npu.NPUGraph()
    with torch.npu.graph(graph):
        y.copy_(x + 1)
    assert y.cpu().tolist() == [0.0] * 4
    for value in (3.0, 4.0):
        x.fill_(value)
        graph.replay()
        assert y.cpu().tolist() == [value + 1] * 4


def test_a_fork_that_joins():
    x, y = zeros(), zeros()
    side = torch.npu.Stream()
    graph = torch.npu.NPUGraph()
    with torch.npu.graph(graph):
        here = torch.npu.current_stream()
        doubled = x + x
        side.wait_stream(here)
        with torch.npu.stream(side):
            product = doubled * x
        here.wait_stream(side)
        y.copy_(product + doubled)
    x.fill_(3)
    graph.replay()
    assert y.cpu().tolist() == [24.0] * 4


def test_a_fork_whose_join_comes_too_late_is_seen():
    x, y, z = zeros(), zeros(), zeros()
    side = torch.npu.Stream()
    graph = torch.npu.NPUGraph()
    with torch.npu.graph(graph):
        here = torch.npu.current_stream()
        side.wait_stream(here)
        with torch.npu.stream(side):
            y.copy_(x)
        z.copy_(y)  # should come after the join
        here.wait_stream(side)
    x.fill_(3)
    graph.replay()
    assert z.cpu().tolist() == [0.0] * 4
    graph.replay()
    assert z.cpu().tolist() == [3.0] * 4


def test_a_stream_that_is_not_joined_is_refused():
    x, y = zeros(), zeros()
    side = torch.npu.Stream()
    with refused("must wait for an event after it"), torch.npu.graph(torch.npu.NPUGraph()):
        side.wait_stream(torch.npu.current_stream())
        with torch.npu.stream(side):
            y.copy_(x)
    y.copy_(x)  # the device goes on
    torch.npu.synchronize()


@pytest.mark.parametrize(
    "call, text",
    [
        (lambda x: torch.npu.synchronize(), "aclrtSynchronizeDevice"),
        (lambda x: torch.npu.current_stream().synchronize(), "aclrtSynchronizeStream"),
        (lambda x: x.cpu(), "is not allowed while|is captured"),
        (lambda x: x[0].item(), "is not allowed while|is captured"),
        (lambda x: torch.tensor([1.0]).npu(), "aclrtMemcpy|pageable|is captured"),
        (lambda x: x.copy_(torch.ones(4), non_blocking=True), "pageable"),
    ],
    ids=["device", "stream", "cpu", "item", "blocking-copy", "pageable-copy"],
)
def test_capture_refuses(call, text):
    x, y = zeros(), zeros()
    with refused(text), torch.npu.graph(torch.npu.NPUGraph()):
        y.copy_(x)
        call(x)
    y.copy_(x)  # the device goes on
    torch.npu.synchronize()


def test_a_capture_that_swallows_a_refusal_still_fails():
    x, y = zeros(), zeros()
    graph = torch.npu.NPUGraph()
    with refused("is invalid: aclrtSynchronizeStream"), torch.npu.graph(graph):
        y.copy_(x)
        with suppress(RuntimeError):
            torch.npu.current_stream().synchronize()


def test_an_event_of_the_capture_cannot_be_waited_for_by_the_host():
    x, y, event = zeros(), zeros(), torch.npu.Event()
    with refused("marks a place in the graph"), torch.npu.graph(torch.npu.NPUGraph()):
        y.copy_(x)
        event.record()
        event.synchronize()


def test_an_event_of_outside_the_capture_is_refused():
    x, y, event = zeros(), zeros(), torch.npu.Event()
    event.record()
    with refused("not recorded in that capture"), torch.npu.graph(torch.npu.NPUGraph()):
        y.copy_(x)
        torch.npu.current_stream().wait_event(event)


def test_memory_may_be_allocated_in_a_capture():
    y = zeros()
    graph = torch.npu.NPUGraph()
    with torch.npu.graph(graph):
        big = torch.full((1 << 20,), 2.0, device="npu")
        y.copy_(big[:4])
    graph.replay()
    assert y.cpu().tolist() == [2.0] * 4


class Updated:
    """A graph that adds a number: an updatable task behind an external event."""

    def __init__(self, with_wait: bool = True) -> None:
        self.x, self.y = torch.ones(4, device="npu"), zeros()
        self.graph, self.event = torch.npu.NPUGraph(), torch.npu.ExternalEvent()
        self.updates = torch.npu.Stream()
        torch.npu.synchronize()
        with torch.npu.graph(self.graph):
            here = torch.npu.current_stream()
            if with_wait:
                self.event.wait(here)
                self.event.reset(here)
            torch.npu.graph_task_group_begin(here)
            torch.add(self.x, 1.0, out=self.y)
            self.group = torch.npu.graph_task_group_end(here)

    def update(self, value: float) -> None:
        with torch.npu.stream(self.updates):
            torch.npu.graph_task_update_begin(self.updates, self.group)
            torch.add(self.x, value, out=self.y)
            torch.npu.graph_task_update_end(self.updates)
            self.event.record(self.updates)


def test_an_update_reaches_a_replay_that_waits_for_it():
    case = Updated()
    for value in (5.0, 6.0, 7.0):
        case.graph.replay()
        case.update(value)  # after the replay was enqueued: it waits for the event
        assert case.y.cpu().tolist() == [value + 1] * 4


def test_an_update_that_is_not_waited_for_comes_too_late():
    case = Updated(with_wait=False)
    case.update(5.0)
    case.graph.replay()
    torch.npu.current_stream().synchronize()
    assert case.y.cpu().tolist() == [2.0] * 4
    torch.npu.synchronize()
    case.graph.replay()
    assert case.y.cpu().tolist() == [6.0] * 4


def test_an_update_must_repeat_the_captured_calls():
    case = Updated(with_wait=False)
    torch.npu.graph_task_update_begin(case.updates, case.group)
    with torch.npu.stream(case.updates):
        torch.mul(case.x, 2.0, out=case.y)
    with pytest.raises(RuntimeError, match="aclnnAdds, its update is aclnnMuls"):
        torch.npu.graph_task_update_end(case.updates)
    torch.npu.graph_task_update_begin(case.updates, case.group)
    with pytest.raises(RuntimeError, match="0 tasks for task group"):
        torch.npu.graph_task_update_end(case.updates)


def test_task_queue_level_2_is_refused_in_a_capture(child):
    done = child(
        """
        import torch
        x = torch.zeros(4, device="npu"); torch.npu.synchronize()
        with torch.npu.graph(torch.npu.NPUGraph()): x.add_(1)
        """,
        env={"TASK_QUEUE_ENABLE": "2"},
    )
    assert done.code != 0
    assert "TASK_QUEUE_ENABLE" in done.output, done.output


def test_a_dump_shows_nodes_and_edges(tmp_path):
    x, y = zeros(), zeros()
    graph = torch.npu.NPUGraph()
    with torch.npu.graph(graph):
        y.copy_(x + 1)
    path = tmp_path / "graph.json"
    graph.debug_dump(str(path))
    nodes = json.loads(path.read_text())
    assert [node["name"] for node in nodes] == ["aclnnAdds", "aclnnInplaceCopy"]
    assert nodes[1]["needs"] == [0]


def test_executors_are_released_with_their_graph():
    from ascend_plugin.ops.sim.bind import TABLE

    x, y = zeros(), zeros()
    torch.npu.synchronize()
    before = len(TABLE)
    graph = torch.npu.NPUGraph()
    with torch.npu.graph(graph):
        for _ in range(10):
            y.copy_(x + 1)
    graph.replay()
    torch.npu.synchronize()
    assert len(TABLE) == before + 20
    graph.reset()
    torch.npu.synchronize()
    assert len(TABLE) == before


def test_counters_tell_captures_replays_groups_and_updates():
    runtime = Runtime()
    before = runtime.counters()
    case = Updated()
    for value in (1.0, 2.0):
        case.graph.replay()
        case.update(value)
    torch.npu.synchronize()
    after = runtime.counters()
    grown = {name: after[name] - before[name] for name in before}
    assert grown["captures"] == grown["task_groups"] == 1
    assert grown["replays"] == grown["updates"] == 2


def test_graphs_hold_streams_until_they_are_destroyed(child):
    """torch_npu makes 34 streams of the 40."""
    done = child(
        """
        import gc, torch, torch_npu
        x, graphs = torch.zeros(4, device="npu"), []
        def capture():
            graph = torch.npu.NPUGraph()
            with torch.npu.graph(graph): x.add_(1)
            graphs.append(graph)
        try:
            for _ in range(7): capture()
        except RuntimeError as error: print(error)
        print(len(graphs), "graphs")
        del graphs[:2]; gc.collect()
        capture(); capture()
        graphs[-1].replay(); print(x.cpu().tolist())
        """,
        streams=40,
    )
    assert done.code == 0, done.output
    assert "error code is 207008" in done.output
    assert "device 0 has no stream left: 34 were made and graphs hold 6, of 40" in done.output
    assert "6 graphs" in done.output
    assert "[1.0, 1.0, 1.0, 1.0]" in done.output
