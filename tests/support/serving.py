"""``vllm serve`` from the outside: started, asked over HTTP, and stopped."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from processes import environment

#: The process, its port and its log.
Server = tuple[subprocess.Popen, int, Path]


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _wait_until_healthy(server: subprocess.Popen, port: int, log: Path, seconds: float) -> None:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        assert server.poll() is None, f"the server ended: {log.read_text()[-4000:]}"
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5):
                return
        except OSError:
            time.sleep(0.5)
    raise TimeoutError(log.read_text()[-4000:])


def wait_until_gone(group: int, seconds: float) -> None:
    """Workers end soon after the server does; none may be left."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        try:
            os.killpg(group, 0)
        except ProcessLookupError:
            return
        time.sleep(0.5)
    raise TimeoutError(f"processes of group {group} are left behind")


def expect_clean_stop(log: str) -> None:
    """The engine ends without an error, and none passes through the plugin.

    vLLM's API server may report a dead engine: it asks for the engine's output until it has
    noticed, itself, that the same signal stopped both.
    """
    failures = [line for line in log.splitlines() if "Traceback" in line]
    assert all(line.startswith("(APIServer") for line in failures), failures
    assert not failures or "EngineDeadError" in log
    assert "ascend_plugin" not in log


def ask(port: int, path: str, body: dict | None = None) -> str:
    request = urllib.request.Request(
        f"http://127.0.0.1:{port}{path}",
        data=None if body is None else json.dumps(body).encode(),
        headers={"Content-Type": "application/json"},
    )
    with urllib.request.urlopen(request, timeout=120) as response:
        return response.read().decode()


@contextmanager
def serving(folder: Path, *arguments: str) -> Iterator[Server]:
    """Start ``vllm serve``: the process, its port and its log; killed if a test leaves it."""
    port, log = _free_port(), folder / "log"
    command = [str(Path(sys.executable).with_name("vllm")), "serve", *arguments]
    command += ["--host", "127.0.0.1", "--port", str(port)]
    with log.open("w") as sink:
        process = subprocess.Popen(
            command,
            stdout=sink,
            stderr=sink,
            env=environment(extra={"VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1"}),
            cwd=folder,
            start_new_session=True,
        )
    try:
        _wait_until_healthy(process, port, log, 240)
        yield process, port, log
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def expect_an_answer(server: Server, question: str, wanted: str) -> None:
    """Ask over the chat API and look for a word in the answer; metrics count its tokens."""
    _, port, _ = server
    model = json.loads(ask(port, "/v1/models"))["data"][0]["id"]
    messages = [{"role": "user", "content": question}]
    body = {"model": model, "messages": messages, "max_tokens": 24, "temperature": 0}
    answer = json.loads(ask(port, "/v1/chat/completions", body))
    assert wanted in answer["choices"][0]["message"]["content"]
    assert "vllm:generation_tokens_total" in ask(port, "/metrics")


def stop(server: Server) -> None:
    """End a server as a user does: no error, and no process left behind."""
    process, _, log = server
    before = len(log.read_text())
    process.send_signal(signal.SIGINT)
    assert process.wait(60) in (0, -signal.SIGINT, 128 + signal.SIGINT)
    wait_until_gone(process.pid, 30)
    expect_clean_stop(log.read_text()[before:])


def expect_end_with_engine(server: Server) -> None:
    """Kill the process with the engine, as a fault in a kernel would: the server ends, as a whole.

    Nothing that could never answer may stay and look alive. (vLLM's server then returns 0.)
    """
    process, _, _ = server
    names = {stat.parent.name: _name(stat) for stat in _children(process.pid)}
    engines = [int(pid) for pid, name in names.items() if name.startswith("VLLM::EngineCor")]
    assert len(engines) == 1, names
    os.kill(engines[0], signal.SIGKILL)
    process.wait(60)
    wait_until_gone(process.pid, 30)


def _children(parent: int) -> list[Path]:
    stats = Path("/proc").glob("[0-9]*/stat")
    return [stat for stat in stats if _fields(stat)[1:2] == [str(parent)]]


def _name(stat: Path) -> str:
    return stat.with_name("comm").read_text().strip()


def _fields(stat: Path) -> list[str]:
    """Return what follows the name: state, parent, group; nothing of a process that is gone."""
    try:
        return stat.read_text(errors="replace").rpartition(")")[2].split()
    except OSError:
        return []
