"""Captured graphs whose attention follows the batch.

A captured graph repeats its kernels with the arguments they were captured with. Everything of a
decode step lies at fixed addresses and may change between replays, but the fused attention takes
the lengths of the sequences as numbers, which are frozen. So each attention is captured as a *task
group*, and before a replay uses it, its arguments are updated on a second stream:

- in the graph, an external event makes the attention wait until its update is done, and is reset;
- on the update stream, the updates wait until the graph's previous replay is over, because its
  attention may still be running, and then record the events.

Nothing waits on the host.
"""

from __future__ import annotations

import functools
import logging
import weakref
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

from ascend_plugin.ops.npu.device import npu

logger = logging.getLogger(__name__)


class Call(Protocol):
    """An attention call that can be launched again, into the same memory, for another batch."""

    def reserve(self, batch: Any, out: Any, room: Callable[[Any], Any]) -> None:
        """Fix the memory of workspace and result; ``room`` may offer workspace that exists."""

    def launch(self, batch: Any) -> None:
        """Launch one kernel, allocating nothing."""

    def release(self) -> None:
        """Let go of the memory of the step, whose addresses stay those of the graph."""


@dataclass(slots=True)
class Counts:
    """What graphs did in this process.

    Attributes:
        captures: graphs captured.
        task_groups: attention calls captured in them.
        replays: graphs replayed.
        updates: attention calls updated.
    """

    captures: int = 0
    task_groups: int = 0
    replays: int = 0
    updates: int = 0


#: Of this process.
counts = Counts()


@dataclass(frozen=True, slots=True)
class Task:
    """One attention call inside a graph.

    Attributes:
        layer: name of the layer, by which its batch is found.
        call: the call, with the addresses it was captured with; the graph's pool keeps them.
        event: what the captured call waits for.
        handle: of the task group.
    """

    layer: str
    call: Call
    event: Any
    handle: Any


#: Returns the batch of a layer in the step that is being run.
BatchOf = Callable[[str], Any]


class NoGraphError(RuntimeError):
    """An attention call was to be captured outside of a graph of this module."""


@functools.cache
def update_stream(device: int) -> Any:
    """Return the stream on which the graphs of a device are updated."""
    return npu.Stream(device=device)


@dataclass(slots=True)
class _Capturing:
    """The graph that is being captured in this process; there is one at most."""

    graph: NPUGraph | None = None
    batch_of: BatchOf | None = None
    workspaces: dict[Any, weakref.ref[Any]] = field(default_factory=dict)

    def room(self, workspace: Any) -> Any:
        """Return memory of the size of ``workspace`` that earlier calls have used, if there is any.

        Calls on one stream follow each other, so those of all layers and graphs share it. It lies
        in the pool of the graphs, and the tasks alone keep it: with a strong reference here the
        pool could not be freed with its graphs, and the next engine of the process would not start.
        """
        kept = self.workspaces.get(workspace.device)
        known = None if kept is None else kept()
        if known is None or known.nbytes < workspace.nbytes:
            self.workspaces[workspace.device] = weakref.ref(workspace)
            return workspace
        return known


_capturing = _Capturing()


def follow_batches(batch_of: BatchOf) -> None:
    """Say how graphs find the batch of a layer when they are replayed."""
    _capturing.batch_of = batch_of


class NPUGraph(npu.NPUGraph):
    """A graph of torch_npu with the attention calls captured in it."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        """Make an empty graph; arguments as in ``torch.npu.NPUGraph``."""
        super().__init__(*args, **kwargs)
        self.tasks: list[Task] = []
        self._replayed: Any = None

    def capture_begin(self, *args: Any, **kwargs: Any) -> None:
        """Begin to capture; arguments as in ``torch.npu.NPUGraph``."""
        self.tasks = []
        _capturing.graph = self
        super().capture_begin(*args, **kwargs)

    def capture_end(self) -> None:
        """End the capture."""
        _capturing.graph = None
        super().capture_end()
        counts.captures += 1
        counts.task_groups += len(self.tasks)

    def replay(self) -> None:
        """Run the graph once more, with attention over the current batch."""
        super().replay()
        counts.replays += 1
        if self.tasks:
            self._update()

    def _update(self) -> None:
        batch_of = _capturing.batch_of
        if batch_of is None:
            raise NoGraphError(
                "a graph with attention was replayed, but nobody says which batch it serves; call "
                "graph.npu.follow_batches() first."
            )
        stream = update_stream(npu.current_device())
        with npu.stream(stream):
            if self._replayed is not None:
                stream.wait_event(self._replayed)
            for task in self.tasks:
                npu.graph_task_update_begin(stream, task.handle)
                task.call.launch(batch_of(task.layer))
                npu.graph_task_update_end(stream)
                task.event.record(stream)
        counts.updates += len(self.tasks)
        self._replayed = npu.Event()
        self._replayed.record(npu.current_stream())


#: What the runtime says when a capture needs more than there is (``ACL_ERROR_RT_…``).
_LIMITS = {
    "207001": "device memory",
    "207005": "resources of the device",
    "207007": "events",
    "207008": "streams",
    "207009": "notifications",
    "207010": "models",
}


def limit_reached(error: BaseException | None) -> str:
    """Return which limit of the device made a capture fail; empty: it was something else.

    Args:
        error: what was raised, with what it was raised from: ending a broken capture fails again.
    """
    while error is not None:
        if type(error).__name__ == "OutOfMemoryError":
            return "device memory"
        for code, name in _LIMITS.items():
            if f"error code is {code}" in str(error):
                return name
        error = error.__cause__ or error.__context__
    return ""


def abandon_capture() -> None:
    """Forget a capture that failed."""
    _capturing.graph = None


def capture_call(layer: str, call: Call, batch: Any, out: Any) -> None:
    """Capture an attention call as a task group of the current graph.

    torch_npu's own ``auto_dispatch_capture`` does not see calls inside an opaque operator of
    vLLM's: their lengths would freeze and every token after the first would be wrong.

    Args:
        layer: name of the layer.
        call: the call.
        batch: what it is captured with.
        out: where the result goes.

    Raises:
        NoGraphError: the stream captures something else than an :class:`NPUGraph`.
    """
    graph = _capturing.graph
    if graph is None:
        raise NoGraphError(
            f"attention of {layer} is captured outside of an NPUGraph of the plugin; its lengths "
            "would never change. Capture with graph.npu.NPUGraph."
        )
    call.reserve(batch, out, _capturing.room)
    stream = npu.current_stream()
    event = npu.ExternalEvent()
    event.wait(stream)
    event.reset(stream)
    npu.graph_task_group_begin(stream)
    call.launch(batch)
    handle = npu.graph_task_group_end(stream)
    call.release()
    graph.tasks.append(Task(layer, call, event, handle))
