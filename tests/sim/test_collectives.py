"""Collectives over simulated HCCL, between real processes."""

from __future__ import annotations

import pytest

pytestmark = pytest.mark.timeout(240)

ALL = """
    npu = lambda *v, dtype=torch.float32: torch.tensor(v, dtype=dtype).npu()
    def check(name, got, want):
        got, want = got.cpu(), torch.as_tensor(want, dtype=got.dtype)
        assert torch.equal(got, want), (rank, name, got, want)

    values = [float(r + 1) for r in range(world)]
    for op, want in [(dist.ReduceOp.SUM, sum(values)), (dist.ReduceOp.MAX, max(values)),
                     (dist.ReduceOp.MIN, 1.0), (dist.ReduceOp.PRODUCT, 6.0 if world == 3 else 2.0)]:
        for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.int32, torch.int64):
            x = npu(rank + 1, rank + 1, dtype=dtype)
            dist.all_reduce(x, op)
            check((op, dtype), x, [want, want])

    big = torch.arange(300_001, dtype=torch.float32) + rank   # several chunks, odd
    x = big.npu(); dist.all_reduce(x)
    check("big", x, torch.arange(300_001) * world + sum(range(world)))

    out = torch.empty(2 * world, device="npu")
    dist.all_gather_into_tensor(out, npu(rank, rank + 10))
    check("all_gather", out, [v for r in range(world) for v in (r, r + 10)])
    parts = [torch.empty(r + 1, device="npu") for r in range(world)]
    dist.all_gather(parts, torch.full((rank + 1,), float(rank)).npu())
    for r in range(world): check("uneven all_gather", parts[r], [float(r)] * (r + 1))

    out = torch.empty(2, device="npu")
    dist.reduce_scatter_tensor(out, torch.arange(2.0 * world).npu() * (rank + 1))
    check("reduce_scatter", out, [2 * rank * sum(values), (2 * rank + 1) * sum(values)])

    x = npu(rank + 7, rank + 7); dist.broadcast(x, 1); check("broadcast", x, [8, 8])
    x = npu(rank + 1); dist.reduce(x, 0)
    if rank == 0: check("reduce", x, [sum(values)])

    out = torch.empty(world, device="npu")
    dist.all_to_all_single(out, npu(*[10 * rank + r for r in range(world)]))
    check("all_to_all", out, [10 * r + rank for r in range(world)])
    counts = [r + 1 for r in range(world)]
    out = torch.empty((rank + 1) * world, device="npu")
    dist.all_to_all_single(out, torch.full((sum(counts),), float(rank)).npu(),
                           [rank + 1] * world, counts)
    check("all_to_all_v", out, [float(r) for r in range(world) for _ in range(rank + 1)])

    if rank == 0: dist.send(npu(5, 6, 7), 1)
    if rank == 1:
        x = torch.empty(3, device="npu"); dist.recv(x, 0); check("recv", x, [5, 6, 7])
    around = [torch.empty(2, device="npu"), npu(rank, rank)]
    for work in dist.batch_isend_irecv([dist.P2POp(dist.isend, around[1], (rank + 1) % world),
                                        dist.P2POp(dist.irecv, around[0], (rank - 1) % world)]):
        work.wait()
    check("ring", around[0], [(rank - 1) % world] * 2)

    pieces = [npu(10 + r) for r in range(world)] if rank == 0 else None
    x = torch.empty(1, device="npu"); dist.scatter(x, pieces, 0); check("scatter", x, [10 + rank])
    pair = dist.new_group([0, 1])
    if rank < 2:
        x = npu(rank + 1); dist.all_reduce(x, group=pair); check("group", x, [3])
    dist.barrier()
    torch.npu.synchronize()
    dist.destroy_process_group()
    print("every collective is right")
"""


@pytest.mark.parametrize("world", [2, 3])
def test_all_collectives(ranks, world):
    for child in ranks(ALL, world, schedule="random" if world == 3 else "lazy"):
        assert child.code == 0, child.output
        assert "every collective is right" in child.output


def test_a_collective_in_a_graph_runs_at_every_replay(ranks):
    code = """
        x, total = torch.ones(4, device="npu"), torch.zeros(4, device="npu")
        dist.all_reduce(torch.ones(4, device="npu"))  # makes the communicator
        torch.npu.synchronize()
        graph = torch.npu.NPUGraph()
        with torch.npu.graph(graph):
            total.copy_(x)
            dist.all_reduce(total)
        for step in range(3):
            x.fill_(step + rank)
            graph.replay()
            assert total.cpu().tolist() == [2.0 * step + 1] * 4, total
        dist.destroy_process_group()
        print("right")
    """
    for child in ranks(code):
        assert child.code == 0, child.output


def test_a_dead_peer_is_named(ranks):
    code = """
        x = torch.ones(4, device="npu")
        dist.all_reduce(x); torch.npu.synchronize()
        if rank == 1: os._exit(3)
        try:
            dist.all_reduce(x); torch.npu.synchronize()
        except RuntimeError as error:
            print("told:", error, flush=True)
            os._exit(5)
    """
    first, second = ranks(code)
    assert second.code == 3, second.output
    assert first.code == 5, first.output
    assert "HcclAllReduce" in first.output
    assert "rank 1 (process " in first.output
    assert "is dead" in first.output


@pytest.mark.parametrize(
    "call, words",
    [
        ("dist.all_reduce(torch.ones(4 + rank).npu())", ["4 elements", "5 elements"]),
        (
            "dist.all_reduce(x) if rank else dist.broadcast(x, 0)",
            ["HcclAllReduce", "HcclBroadcast"],
        ),
    ],
    ids=["sizes", "calls"],
)
def test_ranks_that_disagree_are_told(ranks, call, words):
    code = f"""
        x = torch.ones(4, device="npu")
        dist.all_reduce(x); torch.npu.synchronize()
        try:
            {call}; torch.npu.synchronize()
        except RuntimeError as error:
            print("told:", error, flush=True)
            os._exit(5)
    """
    children = ranks(code, peer_timeout=20.0)
    assert any(child.code == 5 and all(word in child.output for word in words)
               for child in children), [child.output for child in children]  # fmt: skip
