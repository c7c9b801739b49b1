"""Each kind of mistake in a kernel is refused by the host model, and named."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from ascend_plugin.ops.ascendc import host

KERNELS = Path(__file__).parent / "kernels"
SCHEDULES = host.schedules(8)
TILES, TILE, CORES = 11, 64, 3

#: Mistakes of faults.cpp, and what the error says; all under every schedule.
VECTOR_FAULTS = {
    "NO_V_S": "race: .*(GetValue .* reads|ReduceMax .* writes)",
    "NO_VECTOR_BARRIER": r"ReduceMax reads .* Abs wrote .* no PipeBarrier<PIPE_V>",
    "NO_S_MTE3": "race: .*SetValue",
    "NO_V_MTE2": "race: .*(DataCopy|Duplicate)",
    "NO_MTE3_MTE2": "race: DataCopy .* of 'out', which DataCopy",
    "NO_STORE_BARRIER": r"no PipeBarrier<PIPE_MTE3>",
    "ALLOC_FOR_DEQUE": "AllocTensor: all 2 buffers of the VECOUT queue are in use",
    "NO_FREE": "AllocTensor: all 2 buffers of the VECOUT queue are in use",
    "NO_ENQUEUE": "DeQue: the VECIN queue is empty; EnQue is missing",
    "FREE_TWICE": "FreeTensor: the tensor was freed already",
    "USE_AFTER_FREE": "Adds: the tensor of the VECOUT queue was freed",
    "USE_WHILE_QUEUED": "Adds: the tensor of the VECIN queue is in the queue; DeQue is missing",
    "MISALIGNED": "Muls: offset 4 in UB is not a multiple of 32 bytes",
    "PARTIAL_BLOCK": "DataCopy .*61 elements are 244 bytes, no positive multiple of 32",
    "OUTSIDE_GM": "256 bytes at offset 2784 of 'x' leave its 2816 bytes",
    "NULL_POINTER": "the pointer is null",
    "UB_OVERFLOW": "InitBuffer: 196608 bytes do not fit into UB",
    "TENSOR_OVERFLOW": "Muls: 65 elements of 32 bits exceed the tensor's 256 bytes",
    "SET_TWICE": r"SetFlag<V_MTE3>\(0\): the event is set twice",
    "NEVER_WAITED": "event MTE2_MTE3 id 1 set but never waited for",
    "NEVER_SET": r"deadlock: WaitFlag<V_S>\(3\) has no SetFlag before it",
    "EVENT_ID": "event ids are 0 to 7",
    "QUEUE_EVENT": r"SetFlag<MTE2_V>\(0\): a queue holds this event id",
    "CORES_OVERLAP": "race: DataCopy .* of 'counts', which DataCopy",
    "ROUND_MODE": "Cast: RoundMode 0 is not available",
    "CUBE_ON_VECTOR": r"pipe M, which a vector core \(AIV\) lacks",
    "MASK_TOO_LARGE": "Muls: mask 65; a repeat of this type has 1 to 64",
    "PARTIAL_OVERLAP": "overlap partly in UB",
    "COMPARE_COUNT": "60 elements are 240 bytes, no positive multiple of 256",
    "GATHER_OUTSIDE": "Gather: offset 1065353216 of element 0",
    "UNSORTED": "MrgSort: list 0 is not in descending order at record 1",
    "DIRTY_CACHE": "'counts' never left the data cache",
    "SYNC_WITHOUT_SCHEDULER": "SyncAll needs the scheduling module",
}

#: Mistakes of matmul_int8.cpp.
CUBE_FAULTS = {
    "NO_WAIT_FOR_PRODUCT": "race: .*'workspace'",
    "NO_WAIT_FOR_WORKSPACE": "race: .*'workspace'",
    "SIGNAL_TOO_EARLY": "race: .*'workspace'",
    "FREE_TOO_EARLY": "race: .*'workspace'",
    "NEVER_SIGNALLED": r"deadlock: .*CrossCoreWaitFlag\(0\)",
    "SIGNALLED_TWICE": "cross-core flag 2 set but never waited for",
    "NO_CUBE_BARRIER": "Mmad writes .* with no PipeBarrier<PIPE_M>",
    "NO_MTE1_M": "race: .*(LoadData .* writes|Mmad .* reads)",
    "VECTOR_ON_CUBE": r"pipe V, which a cube core \(AIC\) lacks",
    "QUANT_MODE": "Fixpipe: quantPre 16 does not fit the types; it must be 0",
    "MISALIGNED_L0": "LoadData: offset 32 in L0A is not a multiple of 512 bytes",
}


def fault_number(kernel: str, name: str) -> int:
    """The value of an enumerator of a test kernel."""
    body = re.search(r"enum Fault : uint32_t \{(.*?)\}", (KERNELS / kernel).read_text(), re.S)
    assert body is not None
    return re.findall(r"\w+", body[1]).index(name)


def run_vector(fault: str, schedule: host.Schedule, **checks: bool) -> tuple[bool, host.Report]:
    """Run faults.cpp; return whether the results are right."""
    x = torch.arange(1, TILES * TILE + 1, dtype=torch.float32).sin()
    out = torch.zeros_like(x)
    counts = torch.zeros(TILES + 7, dtype=torch.int32)
    arguments = [x, out, counts, TILES, fault_number("faults.cpp", fault)]
    kernel = host.library("faults", KERNELS)
    report = kernel.launch("faults", CORES, arguments, schedule=schedule, **checks)
    largest = x.view(TILES, TILE).abs().amax(1, keepdim=True)
    want = (x.view(TILES, TILE) * (2.0 / largest)).flatten()
    right = torch.equal(out, want) and counts[:TILES].tolist() == list(range(1, TILES + 1))
    return right, report


def run_cube(fault: str, schedule: host.Schedule, **checks: bool) -> tuple[bool, host.Report]:
    """Run matmul_int8.cpp; return whether the results are right."""
    m, n, k, cores = 80, 32, 128, 2
    generator = torch.Generator().manual_seed(0)
    a = torch.randint(-128, 128, (m, k), dtype=torch.int8, generator=generator)
    b = torch.randint(-128, 128, (n, k), dtype=torch.int8, generator=generator)
    out = torch.zeros(m, n)
    workspace = torch.zeros(cores, 16, n, dtype=torch.int32)
    number = fault_number("matmul_int8.cpp", fault)
    arguments = [a, b, out, workspace, m, n, k, 0.5, number]
    kernel = host.library("matmul_int8", KERNELS)
    report = kernel.launch("matmul_int8", cores, arguments, schedule=schedule, **checks)
    return torch.equal(out, (a.int() @ b.int().T).float() * 0.5), report


@pytest.mark.parametrize("run", [run_vector, run_cube])
def test_correct_kernels_pass_under_64_schedules(run) -> None:
    for schedule in host.schedules(64):
        right, _ = run("NONE", schedule)
        assert right, schedule


@pytest.mark.parametrize(("fault", "message"), VECTOR_FAULTS.items())
def test_vector_mistakes_are_named(fault: str, message: str) -> None:
    for schedule in SCHEDULES:
        with pytest.raises(host.KernelError, match=message):
            run_vector(fault, schedule)


@pytest.mark.parametrize(("fault", "message"), CUBE_FAULTS.items())
def test_cube_mistakes_are_named(fault: str, message: str) -> None:
    for schedule in SCHEDULES:
        with pytest.raises(host.KernelError, match=message):
            run_cube(fault, schedule)


def test_a_wrong_accumulation_shows_in_the_data() -> None:
    assert not run_cube("FORGOTTEN_INITIAL", host.Schedule(0))[0]


@pytest.mark.parametrize("seed", range(4))
def test_fresh_memory_is_poisoned(seed: int) -> None:
    assert not run_vector("NO_LOAD", host.Schedule(seed))[0]


@pytest.mark.parametrize(
    ("run", "fault"),
    [
        (run_vector, "NO_V_S"),
        (run_vector, "NO_S_MTE3"),
        (run_cube, "NO_WAIT_FOR_PRODUCT"),
        (run_cube, "SIGNAL_TOO_EARLY"),
        (run_cube, "NO_WAIT_FOR_WORKSPACE"),
    ],
)
def test_schedules_alone_show_missing_flags(run, fault: str) -> None:
    """The pipes are really asynchronous: without the race check, the data are wrong."""

    def wrong(schedule: host.Schedule) -> bool:
        try:
            return not run(fault, schedule, strict=False, races=False)[0]
        except host.KernelError:  # a cross-core flag that is left over
            return True

    assert any(wrong(schedule) for schedule in host.schedules(64))


def test_barriers_within_a_pipe_are_not_needed_unless_strict() -> None:
    assert run_vector("NO_VECTOR_BARRIER", host.Schedule(1), strict=False)[0]
    assert run_cube("NO_CUBE_BARRIER", host.Schedule(1), strict=False)[0]


def sync_all(fault: int, schedule: host.Schedule, cores: int = 5) -> torch.Tensor:
    """First column of what sync_all.cpp leaves."""
    table, out = torch.zeros(cores, 8), torch.full((cores, 8), -1.0)
    kernel = host.library("sync_all", KERNELS)
    kernel.launch("sync_all", cores, [table, out, fault], schedule=schedule)
    return out[:, 0]


def test_sync_all_holds_every_core_back() -> None:
    for schedule in host.schedules(64):
        assert sync_all(0, schedule).tolist() == [1, 2, 3, 4, 0], schedule


def test_missing_sync_all_is_a_race() -> None:
    for schedule in SCHEDULES:
        with pytest.raises(host.KernelError, match=r"race: .* of 'table'"):
            sync_all(1, schedule)


def test_a_core_that_skips_sync_all_is_a_deadlock() -> None:
    for schedule in SCHEDULES:
        with pytest.raises(host.KernelError, match=r"deadlock: AIV 1 waits for CrossCoreWaitFlag"):
            sync_all(2, schedule)


def test_scalar_loads_of_a_cached_line_are_old() -> None:
    assert sync_all(3, host.Schedule(0)).tolist() == [0, 0, 0, 0, 0]


def test_atomic_adds_of_cores_need_no_order() -> None:
    kernel = host.library("sync_all", KERNELS)
    for schedule in SCHEDULES:
        sums, numbers = torch.zeros(8), torch.zeros(6, 16, dtype=torch.int32)
        kernel.launch("add_rows", 6, [sums, numbers, 1], schedule=schedule)
        assert sums.tolist() == [6.0] * 8
        assert numbers[:, 0].tolist() == [1, 2, 3, 4, 5, 6]
        with pytest.raises(host.KernelError, match=r"race: .* of 'sums'"):
            kernel.launch("add_rows", 6, [sums, numbers, 0], schedule=schedule)
