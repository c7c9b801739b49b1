"""A worker process that answers one line of JSON with another."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from types import TracebackType
from typing import Any

from ascend_plugin.bench.serve.driver import OURS, worker_environment
from ascend_plugin.mtp.errors import MTPError


class Worker:
    """``python -m MODULE``, with the plugin active; ends with the ``with`` block."""

    def __init__(self, module: str, threads: int, settings: Mapping[str, Any]) -> None:
        """Start it and tell it the engine's settings.

        Args:
            module: name of a module of this package.
            threads: of torch.
            settings: arguments of ``vllm.LLM``.
        """
        self._model = settings["model"]
        self._process = subprocess.Popen(
            [sys.executable, "-m", f"ascend_plugin.mtp.{module}"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=worker_environment(OURS, threads, os.environ),
        )
        self._tell(settings)

    def __enter__(self) -> Worker:
        """Return itself."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """End the process."""
        self._process.kill()
        self._process.wait()

    def ask(self, message: Mapping[str, Any]) -> Any:
        """Send a message and return the answer.

        Raises:
            MTPError: the process has ended.
        """
        self._tell(message)
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise MTPError(
                f"vLLM ended while it served {self._model}; what it printed stands above. With "
                "--debug it prints more."
            )
        return json.loads(line)

    def _tell(self, message: Mapping[str, Any]) -> None:
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(message) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            pass  # the answer will be missing
