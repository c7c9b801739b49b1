"""Launches of modelled AscendC kernels: the functions that their libraries find with ``dlsym``."""

from __future__ import annotations

import ctypes
import gc
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from ascend_plugin.ops.sim.runtime import Runtime, library

RUN = ctypes.CFUNCTYPE(
    ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_ulonglong
)
DESTROY = ctypes.CFUNCTYPE(None, ctypes.c_void_p)


class Kernel:
    """Copies one int64 to another place and adds to it, when its turn comes."""

    def __init__(self, source: torch.Tensor, target: torch.Tensor, error: str = "") -> None:
        self.runs = self.destroyed = 0
        self.seeds: list[int] = []
        self.error = error
        self._addresses = source.data_ptr(), target.data_ptr()
        self._callbacks = RUN(self._run), DESTROY(self._destroy)

    def _run(self, context: int, error: int, size: int, seed: int) -> int:
        self.seeds.append(seed)
        if self.error:
            ctypes.memmove(error, self.error.encode() + b"\0", len(self.error) + 1)
            return 1
        source, target = (ctypes.c_int64.from_address(at) for at in self._addresses)
        target.value = source.value + context
        self.runs += 1
        library().sim_kernel_report(b'"bytes": 16, "cycles": 5')
        return 0

    def _destroy(self, context: int) -> None:
        self.destroyed += 1

    def launch(self, name: bytes = b"copy_and_add") -> None:
        assert self.enqueue(torch.npu.current_stream().npu_stream, name) == 0

    def enqueue(self, stream: int, name: bytes) -> int:
        run, destroy = self._callbacks
        function = library().sim_launch_kernel
        function.argtypes = [ctypes.c_void_p, ctypes.c_char_p, RUN, ctypes.c_void_p, DESTROY]
        return int(function(stream, name, run, 7, destroy))


@pytest.fixture
def kernel() -> Callable[..., Kernel]:
    """Make a kernel."""
    return Kernel


def test_it_runs_in_the_order_of_its_stream(kernel: Callable[..., Kernel]) -> None:
    source, target = torch.full((2,), 5, device="npu"), torch.zeros(1, dtype=torch.int64).npu()
    before = Runtime().counters()["launches"]
    source.add_(1)
    mine = kernel(source, target)
    mine.launch()
    target.mul_(2)
    assert Runtime().counters()["launches"] - before == 3
    assert target.item() == 2 * (5 + 1 + 7)
    assert (mine.runs, mine.destroyed) == (1, 1)


def test_nothing_runs_before_it_must(kernel: Callable[..., Kernel]) -> None:
    source = torch.zeros(1, dtype=torch.int64).npu()
    torch.npu.synchronize()
    mine = kernel(source, source)
    mine.launch()
    assert mine.runs == 0  # the tests' schedule is lazy
    torch.npu.synchronize()
    assert (mine.runs, mine.seeds) == (1, [1])


def test_a_graph_replays_it_on_what_lies_in_memory_then(kernel: Callable[..., Kernel]) -> None:
    source, target = (torch.zeros(1, dtype=torch.int64).npu() for _ in range(2))
    mine = kernel(source, target)
    graph = torch.npu.NPUGraph()
    with torch.npu.graph(graph):
        mine.launch()
    assert mine.runs == 0
    for value in (3, 40):
        source.fill_(value)
        graph.replay()
        assert target.item() == value + 7
    assert (mine.runs, mine.destroyed) == (2, 0)
    del graph
    gc.collect()
    torch.npu.synchronize()
    assert mine.destroyed == 1


CHILD = f"""
import sys
sys.path.insert(0, {str(Path(__file__).parent)!r})
from test_kernel_launch import *
import torch_npu
x = torch.zeros(1, dtype=torch.int64).npu()
"""


def test_a_failed_kernel_stops_its_device(child: Callable) -> None:
    told = child(
        CHILD
        + """
mine = Kernel(x, x, error="PIPE_V read bytes 0 to 32 of UB that nobody wrote")
mine.launch()
later = Kernel(x, x)
later.launch()
for _ in range(2):
    try:
        torch.npu.synchronize()
    except RuntimeError as error:
        print("RAISED", mine.destroyed, later.runs, later.destroyed)
"""
    )
    assert told.output.count("RAISED 1 0 1") == 2, told.output
    assert "task copy_and_add of stream" in told.output
    assert "failed: PIPE_V read bytes 0 to 32 of UB that nobody wrote" in told.output


@pytest.mark.parametrize("schedule", ["eager", "random"])
def test_the_schedule_is_the_kernels_too(child: Callable, schedule: str) -> None:
    code = """
mine = Kernel(x, x)
for _ in range(3):
    mine.launch()
torch.npu.synchronize()
print("SEEDS", mine.seeds)
"""
    told = child(CHILD + code, schedule=schedule, seed=3).output
    seeds = json.loads(told.split("SEEDS", 1)[1].splitlines()[0])
    if schedule == "eager":
        assert seeds == [0, 0, 0]
    else:
        assert len(set(seeds)) == 3
        assert min(seeds) >= 2


def test_it_is_traced(child: Callable, tmp_path: Path) -> None:
    path = tmp_path / "trace.jsonl"
    told = child(CHILD + "Kernel(x, x).launch()\ntorch.npu.synchronize()\n", trace=str(path))
    assert told.code == 0, told.output
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    (line,) = (each for each in lines if each["operator"] == "copy_and_add")
    assert (line["bytes"], line["cycles"], line["replay"], line["tensors"]) == (16, 5, 0, [])


def test_a_destroyed_stream_is_refused(kernel: Callable[..., Kernel]) -> None:
    source = torch.zeros(1, dtype=torch.int64).npu()
    mine = kernel(source, source)
    assert mine.enqueue(0x1234, b"lost") != 0
    assert (mine.runs, mine.destroyed) == (0, 1)
