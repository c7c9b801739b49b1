"""In which process a model runs on a CPU: what the plugin chooses, and that a user's word wins."""

from __future__ import annotations

import pytest
from processes import run_python
from vllm.config import KVTransferConfig, ParallelConfig, VllmConfig
from vllm.utils.cpu_resource_utils import LogicalCPUInfo

from ascend_plugin.worker import cpu_process

VARIABLES = ("VLLM_CPU_OMP_THREADS_BIND", "VLLM_CPU_NUM_OF_RESERVED_CPU")


@pytest.fixture(autouse=True)
def _few_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing asked for, on a machine of two cores."""
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "1")
    _cores(monkeypatch, [(0, 0), (0, 1)])


def _cores(monkeypatch: pytest.MonkeyPatch, cores: list[tuple[int, int]]) -> None:
    """Let the machine have cores, each a node and a number; two threads each."""
    threads = [LogicalCPUInfo(i, core, node) for i, (node, core) in enumerate(cores * 2)]
    monkeypatch.setattr(cpu_process, "get_allowed_cpu_list", lambda: threads)


def _backend(asked: str | None = None, **settings: object) -> object:
    parallel = ParallelConfig(distributed_executor_backend=asked)
    config = VllmConfig(parallel_config=parallel, **settings)
    return config.parallel_config.distributed_executor_backend


@pytest.mark.parametrize("asked", [None, "uni", "mp"])
def test_few_cores_share_a_process_unless_another_is_asked_for(asked: str | None) -> None:
    assert _backend(asked) == (asked or "uni")


@pytest.mark.parametrize(
    ("cores", "backend"),
    [
        ([(0, i) for i in range(cpu_process.MANY_CORES - 1)], "uni"),
        ([(0, i) for i in range(cpu_process.MANY_CORES)], "mp"),
        ([(0, 0), (1, 0)], "mp"),
    ],
    ids=["few", "many", "two nodes"],
)
def test_the_machine_decides(
    monkeypatch: pytest.MonkeyPatch, cores: list[tuple[int, int]], backend: str
) -> None:
    _cores(monkeypatch, cores)
    assert _backend() == backend


@pytest.mark.parametrize(
    ("variable", "value", "backend"),
    [
        ("VLLM_CPU_OMP_THREADS_BIND", "0", "mp"),
        ("VLLM_CPU_OMP_THREADS_BIND", "auto", "mp"),
        ("VLLM_CPU_OMP_THREADS_BIND", "nobind", "uni"),
        ("VLLM_CPU_NUM_OF_RESERVED_CPU", "1", "mp"),
    ],
)
def test_threads_that_a_user_binds_are_bound(
    monkeypatch: pytest.MonkeyPatch, variable: str, value: str, backend: str
) -> None:
    monkeypatch.setenv(variable, value)
    assert _backend() == backend


def test_a_cache_that_a_connector_moves_keeps_its_worker() -> None:
    connector = KVTransferConfig(kv_connector="ExampleConnector", kv_role="kv_both")
    assert _backend(kv_transfer_config=connector) == "mp"


#: Takes the cores of this machine; prints how many threads torch computes with, and cores.
USE = """
import torch
from ascend_plugin.worker import cpu_process
torch.set_num_threads(1) if "OMP_NUM_THREADS" not in __import__("os").environ else None
cpu_process.use_cores()
print("THREADS", torch.get_num_threads(), len(cpu_process._physical_cores()))
"""


def test_every_core_computes_unless_the_user_says_how_many(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    free = run_python(USE)
    threads, cores = free.stdout.rpartition("THREADS")[2].split()
    assert threads == cores, free.stderr
    told = run_python(USE, env={"OMP_NUM_THREADS": "1"})
    assert told.stdout.rpartition("THREADS")[2].split()[0] == "1", told.stderr
