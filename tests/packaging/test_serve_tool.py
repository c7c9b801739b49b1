"""tools/serve.py: a taken port, a server that ends by itself, and a clean end of the group."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest

pytestmark = pytest.mark.timeout(180)

#: A server with a child that ignores SIGINT and SIGTERM, as a hung worker would.
STUBBORN = """
import http.server, signal, subprocess, sys
child = subprocess.Popen([sys.executable, "-c", '''
import signal, time
signal.signal(signal.SIGINT, signal.SIG_IGN)
signal.signal(signal.SIGTERM, signal.SIG_IGN)
time.sleep(300)'''])
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()
http.server.HTTPServer(("127.0.0.1", int(sys.argv[1])), Handler).serve_forever()
"""
SUPERVISE = """
import sys
tools, program, port = sys.argv[1:]
sys.path.insert(0, tools)
import serve
serve.GRACE_SECONDS = serve.KILL_SECONDS = 1.0
server = serve.Server([sys.executable, "-c", program, port], "http://127.0.0.1:" + port)
print(server.process.pid, server.wait_ready(), flush=True)
server.wait_end()
server.stop()
print("stopped", server.stopping, flush=True)
"""


@pytest.fixture
def port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def group_members(group: int) -> list[str]:
    """The names of living processes in a process group."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            name, _, rest = stat.read_text().rpartition(")")
        except OSError:
            continue
        state, _, its_group = rest.split()[:3]
        if int(its_group) == group and state != "Z":
            found.append(name)
    return found


def test_taken_port_is_a_sentence(repository, run, tmp_path):
    with socket.socket() as holder:
        holder.bind(("127.0.0.1", 0))
        holder.listen()
        port = holder.getsockname()[1]
        command = [sys.executable, repository / "tools" / "serve.py", tmp_path, "--port", str(port)]
        done = run(command, tmp_path, check=False)
    assert done.returncode == 1
    assert f"cannot listen on 127.0.0.1:{port} (Address already in use)" in done.stdout
    assert f"make serve PORT={port + 1}" in done.stdout


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=["ctrl-c", "sigterm"])
def test_stop_leaves_no_process_behind(repository, port, number):
    command = [sys.executable, "-c", SUPERVISE, repository / "tools", STUBBORN, str(port)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        pid, ready = process.stdout.readline().split()
        assert ready == "True"
        assert len(group_members(int(pid))) == 2
        process.send_signal(number)
        out, _ = process.communicate(timeout=30)
    assert process.returncode == 0
    assert "stopped 1" in out
    assert group_members(int(pid)) == []


@pytest.mark.engine
@pytest.mark.slow
def test_failing_server_is_reported(repository, run, tmp_path, port):
    command = [sys.executable, repository / "tools" / "serve.py", tmp_path / "no-model"]
    done = run([*command, "--port", str(port)], tmp_path, check=False, HF_HUB_OFFLINE="1")
    assert done.returncode == 1
    assert "serve: vllm serve ended with status" in done.stdout


@pytest.mark.engine
@pytest.mark.model
@pytest.mark.slow
def test_serve_answers_a_chat_request_and_stops(repository, port):
    model = repository / "models" / "smollm2"
    if not model.is_dir():
        pytest.skip("models/smollm2 is missing: make serve fetches it")
    config = repository / "configs" / "serve" / "smollm2-cpu.yaml"
    command = [sys.executable, repository / "tools" / "serve.py", model, "--config", config]
    with subprocess.Popen(
        [*command, "--port", str(port)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "VLLM_NO_USAGE_STATS": "1"},
    ) as process:
        lines = []
        for line in process.stdout or ():
            lines.append(line)
            if "curl http" in line:
                break
        assert "curl http" in lines[-1], "".join(lines)
        answer = chat(lines[-1])
        start = time.monotonic()
        process.send_signal(signal.SIGINT)
        out, _ = process.communicate(timeout=60)
    assert "Paris" in answer
    assert process.returncode == 0
    assert "serve: stopped" in out
    assert time.monotonic() - start < 40


def chat(curl: str) -> str:
    """Send the request that the printed line would send."""
    url = curl.split()[1]
    body = curl[curl.index("-d '") + 4 : curl.rindex("'")]
    request = urllib.request.Request(
        url,
        data=body.encode(),
        headers={"Content-Type": "application/json"},
    )
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with opener.open(request, timeout=120) as response:
        return json.load(response)["choices"][0]["message"]["content"]
