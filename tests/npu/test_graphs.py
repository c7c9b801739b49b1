"""Captured attention: lengths, blocks and memory in replays, and what stale ones would give."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from ascend_plugin.kv_cache import PageFormat
from ascend_plugin.ops.page_layout import Arrangement, Quantisation

LAYERS = 3
SEQUENCES, HEADS, KV_HEADS, HEAD_DIM, BLOCK = 2, 4, 2, 128, 128


class Model:
    """A few attention layers over pages full of numbers, with buffers that do not move."""

    def __init__(self, device: torch.device, rows: int = 1) -> None:
        from ascend_plugin.ops.npu import attention
        from ascend_plugin.ops.npu.planes import page_planes

        torch.manual_seed(0)
        attention.prepare(device, HEAD_DIM, torch.bfloat16)
        self.device, self.rows = device, rows
        page = PageFormat(
            torch.bfloat16, BLOCK, KV_HEADS, HEAD_DIM, arrangement=Arrangement.PLANE_MAJOR
        )
        shape = page.pages_shape(8)
        self.planes = [
            page_planes(torch.randn(shape).to(torch.bfloat16).to(device), page.plane_layout())
            for _ in range(LAYERS)
        ]
        self.head = attention.Head(HEADS, HEAD_DIM**-0.5)
        self.query = torch.randn(SEQUENCES * rows, HEADS, HEAD_DIM).to(torch.bfloat16).to(device)
        self.blocks = torch.zeros(SEQUENCES, 2, dtype=torch.int32, device=device)
        self.out = torch.zeros_like(self.query)
        self.current: Any = None

    def batch(self, lengths: list[int], table: list[list[int]]) -> Any:
        """Set the batch of the next step."""
        from ascend_plugin.ops.npu.attention import Batch

        self.blocks.copy_(torch.tensor(table, dtype=torch.int32) * 2)
        ends = [self.rows * (i + 1) for i in range(SEQUENCES)]
        self.current = Batch(ends, lengths, self.blocks, self.rows)
        return self.current

    def eager(self) -> torch.Tensor:
        from ascend_plugin.ops.npu import attention

        query, out = self.query, torch.empty_like(self.query)
        for planes in self.planes:
            attention.attend(query, planes, self.current, self.head, out)
            query = query + out
        return query.cpu()

    def captured(self) -> None:
        """Run the layers as a model runner does while it captures."""
        from ascend_plugin.graph import npu as graphs
        from ascend_plugin.ops.npu import attention

        query = self.query
        for i, planes in enumerate(self.planes):
            out = torch.empty_like(query)
            call = attention.fused_call(query, planes, self.current, self.head)
            graphs.capture_call(f"layer {i}", call, self.current, out)
            query = query + out
        self.out.copy_(query)

    def capture(self) -> Any:
        from ascend_plugin.graph import npu as graphs
        from ascend_plugin.ops.npu.device import npu

        self.batch([10] * SEQUENCES, [[1, 2], [3, 4]])
        graph = graphs.NPUGraph()
        with npu.graph(graph):
            self.captured()
        return graph

    def replay(self, graph: Any) -> torch.Tensor:
        graph.replay()
        return self.out.cpu()


STEPS = [
    ([11, 40], [[1, 2], [3, 4]]),
    ([12, 200], [[1, 2], [5, 6]]),
    ([256, 41], [[7, 2], [3, 1]]),
    ([13, 0], [[1, 2], [0, 0]]),  # the second sequence pads the graph
]


@pytest.fixture
def model(device: torch.device) -> Model:
    return Model(device)


@pytest.fixture
def follow(model: Model) -> Callable[[Any], None]:
    """Make replays serve the model's current batch, or what a function says."""
    from ascend_plugin.graph import npu as graphs

    graphs.follow_batches(lambda layer: model.current)
    return graphs.follow_batches


@pytest.mark.parametrize("rows", [1, 4])
def test_replays_follow_lengths_and_blocks(
    device: torch.device, rows: int, follow: Callable[[Any], None]
) -> None:
    from ascend_plugin.graph import npu as graphs

    model = Model(device, rows)
    follow(lambda layer: model.current)
    graph = model.capture()
    before = graphs.counts.captures, graphs.counts.task_groups, graphs.counts.updates
    assert len(graph.tasks) == LAYERS
    for lengths, table in STEPS:
        model.batch(lengths, table)
        assert torch.equal(model.replay(graph), model.eager())
    assert (graphs.counts.captures, graphs.counts.task_groups) == before[:2]
    assert graphs.counts.updates == before[2] + LAYERS * len(STEPS)


def test_replays_follow_each_other_without_waiting(
    model: Model, follow: Callable[[Any], None]
) -> None:
    """The update of a step must not overtake the attention of the step before it."""
    graph = model.capture()
    results, wanted = [], []
    for lengths, table in STEPS:
        model.batch(lengths, table)
        wanted.append(model.eager())
    for lengths, table in STEPS:
        model.batch(lengths, table)
        graph.replay()
        results.append(model.out.clone())  # stays on the device until all are launched
    for got, want in zip(results, wanted, strict=True):
        assert torch.equal(got.cpu(), want)


def test_a_stale_length_would_show(model: Model, follow: Callable[[Any], None]) -> None:
    """Planted: the update repeats the lengths of the capture."""
    graph = model.capture()
    frozen = model.current
    follow(lambda layer: frozen)
    model.batch(*STEPS[1])
    assert not torch.equal(model.replay(graph), model.eager())


def test_one_layer_without_an_update_would_show(
    model: Model, follow: Callable[[Any], None]
) -> None:
    """Planted: the last layer keeps the lengths of the step before."""
    graph = model.capture()
    model.batch(*STEPS[0])
    model.replay(graph)
    before = model.current
    model.batch(*STEPS[1])
    follow(lambda layer: before if layer == f"layer {LAYERS - 1}" else model.current)
    assert not torch.equal(model.replay(graph), model.eager())


def test_a_stale_address_would_show(model: Model, follow: Callable[[Any], None]) -> None:
    """Planted: the block table of a step lies elsewhere than the one that was captured."""
    graph = model.capture()
    lengths, table = STEPS[2]
    model.blocks = torch.zeros_like(model.blocks)
    captured = graph.tasks[0].call.options["block_table"]
    model.batch(lengths, table)
    assert captured.data_ptr() != model.blocks.data_ptr()
    assert not torch.equal(model.replay(graph), model.eager())


def test_attention_outside_of_the_plugins_graphs_is_refused(model: Model) -> None:
    """With torch_npu's own graph nothing would update the lengths: wrong tokens, silently."""
    from ascend_plugin.graph import npu as graphs
    from ascend_plugin.ops.npu.device import npu

    model.batch([10] * SEQUENCES, [[1, 2], [3, 4]])
    with (
        pytest.raises(graphs.NoGraphError, match="its lengths would never change"),
        npu.graph(npu.NPUGraph()),
    ):
        model.captured()


def test_layers_share_one_workspace(model: Model, follow: Callable[[Any], None]) -> None:
    graph = model.capture()
    workspaces = {task.call.options["workspace"].data_ptr() for task in graph.tasks}
    assert len(workspaces) == 1


def test_layers_share_the_memory_of_a_step(model: Model, follow: Callable[[Any], None]) -> None:
    """Queries and results of a layer make room for those of the next, in every graph."""
    from ascend_plugin.ops.npu.device import npu

    torch.npu.synchronize()
    graphs = [model.capture()]
    before = npu.memory_allocated()
    graphs += [model.capture() for _ in range(3)]
    # A workspace, what the softmax's sums would be, and nothing of LAYERS * 3 queries and results.
    assert npu.memory_allocated() - before < model.query.nbytes * LAYERS
    lengths, table = STEPS[1]
    model.batch(lengths, table)
    for graph in graphs:
        assert torch.equal(model.replay(graph), model.eager())


def test_int8_pages_in_a_graph(device: torch.device, follow: Callable[[Any], None]) -> None:
    """The scales of c8d are gathered by the graph itself."""
    from ascend_plugin.graph import npu as graphs
    from ascend_plugin.ops.npu import attention
    from ascend_plugin.ops.npu.device import npu
    from ascend_plugin.ops.npu.planes import page_planes

    torch.manual_seed(1)
    page = PageFormat(
        torch.int8, BLOCK, 1, HEAD_DIM, Quantisation.C8D, arrangement=Arrangement.PLANE_MAJOR
    )
    raw = torch.randint(-127, 128, page.pages_shape(8), dtype=torch.int8)
    planes = page_planes(raw.to(device), page.plane_layout())
    assert planes.scales is not None
    planes.scales.copy_(torch.rand(planes.scales.shape) * 0.01)
    head = attention.Head(10, HEAD_DIM**-0.5, quantisation=Quantisation.C8D)
    model = Model(device)
    follow(lambda layer: model.current)
    query = torch.randn(SEQUENCES, 10, HEAD_DIM).to(torch.bfloat16).to(device)
    out = torch.zeros_like(query)
    model.batch([10] * SEQUENCES, [[1, 2], [3, 4]])
    graph = graphs.NPUGraph()
    with npu.graph(graph):
        turned = attention.rotate(query)
        call = attention.fused_call(turned, planes, model.current, head)
        graphs.capture_call("layer", call, model.current, out)
    for lengths, table in STEPS:
        model.batch(lengths, table)
        want = torch.empty_like(query)
        attention.attend(query, planes, model.current, head, want)
        graph.replay()
        assert torch.equal(out.cpu(), want.cpu())
