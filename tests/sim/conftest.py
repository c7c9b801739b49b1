"""Tests of the simulator: in a process under ``ascend-plugin sim run``, and in children of it."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import pytest
from measuring import unmeasured

from ascend_plugin.ops.sim.options import OPTIONS_VARIABLE, SimulatorOptions


@dataclass(frozen=True)
class Child:
    """What a finished child process left."""

    code: int
    output: str


def _environment(options: dict[str, object], extra: dict[str, str]) -> dict[str, str]:
    base = SimulatorOptions.from_environment()
    assert base is not None, "these tests run under: ascend-plugin sim run -- python -m pytest"
    changed = replace(base, **options)
    inherited = {key: value for key, value in os.environ.items() if "COVERAGE" not in key}
    return {**inherited, OPTIONS_VARIABLE: changed.to_json(), "OMP_NUM_THREADS": "1", **extra}


@pytest.fixture(scope="module", autouse=True)
def _unmeasured() -> Iterator[None]:
    """What is measured is the NPU's code of the plugin, which does not run here."""
    with unmeasured():
        yield


def _start(code: str, options: dict[str, object], extra: dict[str, str]) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(code)],
        env=_environment(options, extra),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def _finish(process: subprocess.Popen[str], timeout: float) -> Child:
    try:
        output, _ = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        process.kill()
        output, _ = process.communicate()
        pytest.fail(f"a child hangs; it wrote:\n{output}")
    return Child(process.returncode, output)


@pytest.fixture
def child() -> Callable[..., Child]:
    """Run Python code in a process of its own: errors of a device are for good."""

    def run(code: str, *, env: dict[str, str] | None = None, **options: object) -> Child:
        return _finish(_start(code, options, env or {}), 120)

    return run


@pytest.fixture
def ranks(tmp_path) -> Callable[..., list[Child]]:
    """Run Python code once per rank, with ``rank``, ``world``, ``dist`` and a process group."""
    prologue = f"""
        import os, torch, torch.distributed as dist
        rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        torch.npu.set_device(int(os.environ["LOCAL_DEVICE"]))
        dist.init_process_group("hccl", init_method="file://{tmp_path}/rendezvous",
                                rank=rank, world_size=world)
    """

    def run(code: str, world: int = 2, **options: object) -> list[Child]:
        whole = textwrap.dedent(prologue) + textwrap.dedent(code)
        processes = [
            _start(
                whole,
                {"devices": world, **options},
                {"RANK": str(rank), "WORLD_SIZE": str(world), "LOCAL_DEVICE": str(rank)},
            )
            for rank in range(world)
        ]
        return [_finish(process, 120) for process in processes]

    return run
