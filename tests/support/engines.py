"""Engines for tests: stock vLLM and the plugin, each in a process that serves many jobs."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import threading
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from processes import environment

SERVER = Path(__file__).with_name("engine_server.py")

#: In one process, with one thread: deterministic, and quick to start.
ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "OMP_NUM_THREADS": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
}
STOCK = {"VLLM_PLUGINS": "none"}


@dataclass(frozen=True, slots=True)
class Output:
    """One completion."""

    tokens: list[int]
    logprobs: list[float]
    margins: list[float]
    cached: int


@dataclass(slots=True)
class Answer:
    """What a job gave: outputs by run (or why a run was refused), counters, and the parts used.

    ``counters`` are those of int8 caches during the job, by variant: rows, saturated, patched,
    patches without a slot.
    """

    runs: list[Any]
    metrics: dict[str, float]
    made_of: dict[str, Any]
    counters: dict[str, list[int]] = field(default_factory=dict)
    steps: dict[str, list[Any]] = field(default_factory=dict)
    load: dict[str, Any] = field(default_factory=dict)
    log: str = field(repr=False, default="")

    def outputs(self, run: int = 0) -> list[Output]:
        assert "outputs" in self.runs[run], self.runs[run]
        return [Output(**output) for output in self.runs[run]["outputs"]]


class EngineProcess:
    """A process that serves jobs; started by the first one."""

    def __init__(self, variables: dict[str, str]) -> None:
        self._variables = ENVIRONMENT | variables
        self._process: subprocess.Popen[str] | None = None
        self._known: dict[str, Answer] = {}

    def run(self, engine: dict[str, Any], *runs: dict[str, Any], timeout: float = 400) -> Answer:
        """Run a job, or return its answer if it ran before.

        Args:
            engine: keyword arguments of ``vllm.LLM``.
            runs: ``{"prompts": [...], "max_tokens": n}``, one after the other on one engine.
            timeout: seconds until the process is given up.
        """
        job = json.dumps({"engine": engine, "runs": runs})
        if job not in self._known:
            self._known[job] = self._ask(job, timeout)
            on_npu = self._known[job].made_of.get("platform") == "AscendNPUPlatform"
            method = engine.get("speculative_config", {}).get("method")
            if method == "ngram" and not on_npu:
                # The n-gram proposer imports numba, which the next engine of a process does not
                # survive: vllm/triton_utils/dispatcher.py, _rebind_kernels. (The NPU's platform
                # replaces its kernels once in a process.)
                self.stop()
        return self._known[job]

    def stop(self) -> None:
        """End the process."""
        if self._process is None:
            return
        self._process.stdin.close()
        try:
            self._process.wait(20)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._answers.close()
        self._log.close()
        self._process = None

    def _start(self) -> None:
        reading, writing = os.pipe()
        self._answers = os.fdopen(reading)
        self._log = tempfile.TemporaryFile("w+")  # noqa: SIM115  closed by stop()
        self._process = subprocess.Popen(
            [sys.executable, str(SERVER), str(writing)],
            stdin=subprocess.PIPE,
            stdout=self._log,
            stderr=self._log,
            env=environment(extra=self._variables),
            pass_fds=[writing],
            text=True,
            cwd=tempfile.gettempdir(),
        )
        os.close(writing)

    def _ask(self, job: str, timeout: float) -> Answer:
        if self._process is None:
            self._start()
        before = os.fstat(self._log.fileno()).st_size
        self._process.stdin.write(job + "\n")
        self._process.stdin.flush()
        watchdog = threading.Timer(timeout, self._process.kill)
        watchdog.start()
        line = self._answers.readline()
        watchdog.cancel()
        log = self._log_since(before)
        answer = json.loads(line) if line else {"failed": "the process died or took too long"}
        if "failed" in answer:
            self.stop()
            raise RuntimeError(f"{answer['failed']}\n{log[-6000:]}")
        return Answer(**answer, log=log)

    def _log_since(self, position: int) -> str:
        with open(f"/proc/self/fd/{self._log.fileno()}") as log:
            log.seek(position)
            return log.read()


@dataclass(slots=True)
class Difference:
    """Where two completions of one prompt part."""

    prompt: int
    step: int
    margin: float


def first_differences(want: list[Output], got: list[Output]) -> list[Difference]:
    """Return the first different token of each pair, and how clear the wanted one was."""
    assert len(want) == len(got)
    found = []
    for i, (left, right) in enumerate(zip(want, got, strict=True)):
        assert len(left.tokens) == len(right.tokens)
        for step, pair in enumerate(zip(left.tokens, right.tokens, strict=True)):
            if pair[0] != pair[1]:
                found.append(Difference(i, step, left.margins[step]))
                break
    return found


def assert_same(want: list[Output], got: list[Output], tolerance: float = 1e-4) -> None:
    """Every token equal, every logprob within the tolerance."""
    assert first_differences(want, got) == []
    worst = max(
        abs(a - b)
        for left, right in zip(want, got, strict=True)
        for a, b in zip(left.logprobs, right.logprobs, strict=True)
    )
    assert worst <= tolerance, f"logprobs differ by {worst}"
