"""``vllm serve`` from the outside: a question over HTTP, and a clean stop."""

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
from pathlib import Path

import pytest
import yaml
from processes import environment

REPOSITORY = Path(__file__).resolve().parents[2]
CONFIGS = sorted((REPOSITORY / "configs" / "serve").glob("*.yaml"))


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


def _wait_until_gone(group: int, seconds: float) -> None:
    """Workers end soon after the server does; none may be left."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        try:
            os.killpg(group, 0)
        except ProcessLookupError:
            return
        time.sleep(0.5)
    raise TimeoutError(f"processes of group {group} are left behind")


def _expect_clean_stop(log: str) -> None:
    """The engine ends without an error, and none passes through the plugin.

    vLLM's API server may report a dead engine: it asks for the engine's output until it has
    noticed, itself, that the same signal stopped both.
    """
    failures = [line for line in log.splitlines() if "Traceback" in line]
    assert all(line.startswith("(APIServer") for line in failures), failures
    assert not failures or "EngineDeadError" in log
    assert "ascend_plugin" not in log


def _ask(port: int, path: str, body: dict | None = None) -> str:
    request = urllib.request.Request(
        f"http://127.0.0.1:{port}{path}",
        data=None if body is None else json.dumps(body).encode(),
        headers={"Content-Type": "application/json"},
    )
    with urllib.request.urlopen(request, timeout=120) as response:
        return response.read().decode()


@pytest.fixture
def server(smollm2: str, tmp_path: Path) -> Iterator[tuple[subprocess.Popen, int, Path]]:
    """A running server, its port and its log; killed if a test leaves it behind."""
    port, log = _free_port(), tmp_path / "log"
    command = [str(Path(sys.executable).with_name("vllm")), "serve", smollm2]
    command += ["--config", str(REPOSITORY / "configs" / "serve" / "smollm2-cpu.yaml")]
    command += ["--host", "127.0.0.1", "--port", str(port), "--block-size", "32"]
    with log.open("w") as sink:
        process = subprocess.Popen(
            command,
            stdout=sink,
            stderr=sink,
            env=environment(extra={"VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1"}),
            cwd=tmp_path,
            start_new_session=True,
        )
    yield process, port, log
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


@pytest.mark.engine
@pytest.mark.model
@pytest.mark.slow
def test_serve(server: tuple[subprocess.Popen, int, Path]) -> None:
    process, port, log = server
    _wait_until_healthy(process, port, log, 240)
    model = json.loads(_ask(port, "/v1/models"))["data"][0]["id"]
    question = [{"role": "user", "content": "What is the capital of France?"}]
    body = {"model": model, "messages": question, "max_tokens": 24, "temperature": 0}
    answer = json.loads(_ask(port, "/v1/chat/completions", body))
    assert "Paris" in answer["choices"][0]["message"]["content"]
    assert "vllm:generation_tokens_total" in _ask(port, "/metrics")
    text = log.read_text()
    assert "paged_attention runs on 'native'" in text
    process.send_signal(signal.SIGINT)
    assert process.wait(60) in (0, -signal.SIGINT, 128 + signal.SIGINT)
    _wait_until_gone(process.pid, 30)
    _expect_clean_stop(log.read_text()[len(text) :])


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_configurations_are_understood(path: Path) -> None:
    """By the parser of ``vllm serve``, which refuses options that do not exist."""
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.entrypoints.cli.serve import ServeSubcommand
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    parser = FlexibleArgumentParser()
    ServeSubcommand().subparser_init(parser.add_subparsers())
    plain = vars(parser.parse_args(["serve", "some/model"]))
    parsed = parser.parse_args(["serve", "some/model", "--config", str(path)])
    changed = {key for key, value in vars(parsed).items() if value != plain[key]}
    written = yaml.safe_load(path.read_text())
    assert changed - {"config"} <= {key.replace("-", "_") for key in written}
    assert len(changed) > 1
    AsyncEngineArgs.from_cli_args(parsed)


def test_there_are_configurations() -> None:
    assert CONFIGS
