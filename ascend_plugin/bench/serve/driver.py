"""Starts a worker process and talks to it."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TypeVar

from ascend_plugin.bench.errors import BenchError
from ascend_plugin.bench.serve import messages

AnswerT = TypeVar("AnswerT", bound=messages.Answer)

#: Variables that would make the two contenders differ, or override what the driver asks for.
_UNSET = ("VLLM_TARGET_DEVICE", "VLLM_CPU_KVCACHE_SPACE", "VLLM_CPU_NUM_OF_RESERVED_CPU")

_LOG_LINES = 12


@dataclass(frozen=True, slots=True)
class ContenderSpec:
    """Who runs in a worker.

    Attributes:
        name: in results.
        plugins: value of ``VLLM_PLUGINS``; None: it is not vLLM.
        platform_of: package that the platform must come from.
        module: that the process runs.
    """

    name: str
    plugins: str | None
    platform_of: str
    module: str = "ascend_plugin.bench.serve.worker"


OURS = ContenderSpec("ascend-plugin", "ascend,ascend_general", "ascend_plugin")
STOCK = ContenderSpec("vllm", "none", "vllm")
LLAMA_CPP = ContenderSpec(
    "llama.cpp", None, "llama_cpp", "ascend_plugin.bench.serve.llama_cpp_worker"
)


def worker_environment(
    spec: ContenderSpec, threads: int, environment: Mapping[str, str]
) -> dict[str, str]:
    """Return a worker's environment: equal for both of vLLM's but for ``VLLM_PLUGINS``.

    llama.cpp gets the caller's own with the same number of threads.
    """
    kept = {name: value for name, value in environment.items() if name not in _UNSET}
    if spec.plugins is None:
        return kept | {"OMP_NUM_THREADS": str(threads)}
    return kept | {
        "VLLM_PLUGINS": spec.plugins,
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        # vLLM would keep a core free for its scheduler; here the engine waits while it computes.
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "OMP_NUM_THREADS": str(threads),
        "LD_PRELOAD": preload(environment.get("LD_PRELOAD", "")),
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",
    }


def preload(current: str) -> str:
    """Return ``LD_PRELOAD`` as ``CpuPlatform.check_and_update_config`` sets it for its workers.

    The engine runs in the worker's own process here, where it would be set too late.
    """
    libraries = [current] if current else []
    if not any(name in current for name in ("libomp", "libgomp", "libiomp")):
        torch = _package_folder("torch")
        folders = [torch.parent / "torch.libs", torch / "lib"]
        found = [path for folder in folders for path in sorted(folder.glob("libgomp*.so*"))]
        libraries += [str(path) for path in found[:1]]
    if "libtcmalloc" not in current:
        folder = _package_folder("vllm") / "libs"
        patterns = ("libtcmalloc_minimal*.so*", "libtcmalloc.so*")
        found = [path for pattern in patterns for path in sorted(folder.glob(pattern))]
        libraries = [str(path) for path in found[:1]] + libraries
    return ":".join(libraries)


def _package_folder(name: str) -> Path:
    spec = importlib.util.find_spec(name)
    if spec is None or not spec.submodule_search_locations:
        raise BenchError(f"bench serve needs {name}, which is not installed. Run make install.")
    return Path(spec.submodule_search_locations[0])


class WorkerProcess:
    """A running worker."""

    def __init__(self, spec: ContenderSpec, threads: int, log: Path) -> None:
        """Start the process.

        Args:
            spec: who runs.
            threads: OpenMP threads.
            log: file for everything that it prints.
        """
        self.spec = spec
        self._log = log
        with log.open("wb") as stderr:
            self._process = subprocess.Popen(
                [sys.executable, "-m", spec.module],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=stderr,
                text=True,
                env=worker_environment(spec, threads, os.environ),
            )

    def send(self, command: messages.Command) -> None:
        """Send a command without waiting.

        Raises:
            BenchError: the process has died.
        """
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps([type(command).__name__, asdict(command)]) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            raise self._died() from None

    def receive(self, answer: type[AnswerT]) -> AnswerT:
        """Wait for the answer to the command that was sent.

        Raises:
            BenchError: the process has died.
        """
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise self._died()
        return answer(**json.loads(line))

    def ask(self, command: messages.Command, answer: type[AnswerT]) -> AnswerT:
        """Send a command and wait for its answer."""
        self.send(command)
        return self.receive(answer)

    def close(self) -> None:
        """End the process, by force if it does not end by itself."""
        if self._process.stdin is not None and not self._process.stdin.closed:
            with contextlib.suppress(BrokenPipeError):
                self._process.stdin.close()
        try:
            self._process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def _died(self) -> BenchError:
        code = self._process.wait()
        lines = self._log.read_text(encoding="utf-8", errors="replace").splitlines()
        tail = "\n".join(lines[-_LOG_LINES:])
        return BenchError(
            f"the engine of {self.spec.name} ended with exit code {code}; its last lines:\n{tail}"
        )
