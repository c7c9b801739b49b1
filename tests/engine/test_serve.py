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
from contextlib import contextmanager
from pathlib import Path

import pytest
import yaml
from int8_engines import Int8Models
from processes import environment

REPOSITORY = Path(__file__).resolve().parents[2]
Server = tuple[subprocess.Popen, int, Path]
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


@contextmanager
def _serving(folder: Path, *arguments: str) -> Iterator[Server]:
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


@pytest.mark.engine
@pytest.mark.model
@pytest.mark.slow
def test_serve(smollm2: str, tmp_path: Path) -> None:
    config = str(REPOSITORY / "configs" / "serve" / "smollm2-cpu.yaml")
    with _serving(tmp_path, smollm2, "--config", config, "--block-size", "32") as server:
        _ask_and_stop(*server)


def _ask_and_stop(process: subprocess.Popen, port: int, log: Path) -> None:
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


@pytest.mark.engine
@pytest.mark.slow
def test_counters_of_an_int8_cache_on_metrics(int8: Int8Models, tmp_path: Path) -> None:
    """From the worker's process to the server's."""
    model = int8("llama")
    options = {
        "--served-model-name": "tiny",
        "--dtype": "float32",
        "--max-model-len": "512",
        "--kv-cache-memory-bytes": str(1 << 26),
        "--kv-cache-dtype": "int8_per_token_head",
        "--additional-config": json.dumps(model.config("c8p")),
    }
    flags = ["--skip-tokenizer-init", "--enforce-eager"]
    with _serving(tmp_path, model.path, *flags, *sum(options.items(), ())) as (_, port, _log):
        assert "ascend_plugin:kv_cache_rows_total{" not in _ask(port, "/metrics")
        prompt = [5, 7, 14, 21, 9, 28, 35, 42]
        body = {"model": "tiny", "prompt": prompt, "max_tokens": 4, "detokenize": False}
        assert json.loads(_ask(port, "/v1/completions", body))["usage"]["completion_tokens"] == 4
        labels = '{model_name="tiny",variant="c8p"}'
        lines = _ask(port, "/metrics").splitlines()
        counts = {line.split("{")[0]: float(line.split()[-1]) for line in lines if labels in line}
    rows = (len(prompt) + 3) * 2 * 2 * model.offline.layers
    assert counts["ascend_plugin:kv_cache_rows_total"] == rows
    assert 0 < counts["ascend_plugin:kv_cache_patched_total"] < rows
    assert counts["ascend_plugin:kv_cache_saturated_total"] > 0
    assert counts["ascend_plugin:kv_cache_patch_overflows_total"] == 0


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
