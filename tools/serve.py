#!/usr/bin/env python3
"""Run ``vllm serve`` as a child, say when it answers, and take it down whole.

vLLM starts several processes. This one keeps them in a process group of their own, so that Ctrl-C
or SIGTERM (from make, a container, a service manager) ends them in order and leaves none behind.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path
from types import FrameType

#: vLLM finishes its requests and stops its engine within a few seconds.
GRACE_SECONDS = 20.0
KILL_SECONDS = 5.0
#: Health and model names are asked on this machine: never through a proxy.
OPENER = urllib.request.build_opener(urllib.request.ProxyHandler({}))


class Server:
    """``vllm serve`` and the processes that it starts.

    Args:
        command: what to run.
        url: where it will answer.
    """

    def __init__(self, command: list[str], url: str) -> None:
        self.url = url
        self.stopping = 0
        bin_folder = str(Path(sys.executable).parent)
        path = os.pathsep.join([bin_folder, os.environ.get("PATH", "")])
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, self._on_signal)
        self.process = subprocess.Popen(
            command, start_new_session=True, env={**os.environ, "PATH": path}
        )

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self.stopping += 1

    def wait_ready(self) -> bool:
        """Wait until it answers; False when it ended or was told to stop before."""
        while not self.stopping and self.process.poll() is None:
            if self.get("/health") is not None:
                return True
            time.sleep(0.5)
        return False

    def wait_end(self) -> None:
        """Wait until it ends or is told to stop."""
        while not self.stopping and self.process.poll() is None:
            time.sleep(0.2)

    def get(self, path: str) -> bytes | None:
        """Fetch a path; None when it does not answer (yet)."""
        try:
            with OPENER.open(self.url + path, timeout=2) as response:
                return bytes(response.read())
        except OSError:
            return None

    def stop(self) -> None:
        """End the whole process group: politely, then firmly."""
        asked = self.stopping
        for number, seconds in (
            (signal.SIGINT, GRACE_SECONDS),
            (signal.SIGTERM, KILL_SECONDS),
            (signal.SIGKILL, KILL_SECONDS),
        ):
            if number == signal.SIGINT and self.process.poll() is not None:
                continue  # the parent is gone; only stragglers are left
            self._send(number)
            end = time.monotonic() + seconds
            while time.monotonic() < end and self._alive():
                time.sleep(0.1)
                if self.stopping > asked:  # a second Ctrl-C: the person is in a hurry
                    asked = self.stopping
                    break
            if not self._alive():
                return

    def _send(self, number: signal.Signals) -> None:
        try:
            # SIGINT to the parent only: it stops its engine itself, in order.
            if number == signal.SIGINT:
                self.process.send_signal(number)
            else:
                os.killpg(self.process.pid, number)
        except ProcessLookupError:
            pass

    def _alive(self) -> bool:
        self.process.poll()  # reap it
        return any(_in_group(stat, self.process.pid) for stat in Path("/proc").glob("[0-9]*/stat"))


def _in_group(stat: Path, group: int) -> bool:
    try:
        # pid (name) state ppid pgrp ...; the name may hold anything.
        state, _, found = stat.read_text(errors="replace").rpartition(")")[2].split()[:3]
    except (OSError, ValueError):
        return False
    # A zombie is over; in a container nobody may ever collect it.
    return int(found) == group and state not in "ZX"


def port_problem(host: str, port: int) -> str | None:
    """Return a sentence when ``vllm serve`` could not listen there."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except (OSError, OverflowError) as error:
            reason = getattr(error, "strerror", None) or str(error)
            return (
                f"cannot listen on {host}:{port} ({reason}). Stop what uses it, or choose another "
                f"port: make serve PORT={port + 1}"
            )
    return None


def curl_line(server: Server) -> str:
    """Return a chat request that can be pasted into a shell."""
    models = json.loads(server.get("/v1/models") or b'{"data": []}')["data"]
    request = {
        "model": models[0]["id"] if models else "MODEL",
        "messages": [{"role": "user", "content": "What is the capital of France?"}],
        "temperature": 0,
    }
    header = "-H 'Content-Type: application/json'"
    return f"curl {server.url}/v1/chat/completions {header} -d '{json.dumps(request)}'"


def parse_arguments() -> tuple[argparse.Namespace, list[str]]:
    """Read the command line; what is not known here goes to ``vllm serve``."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("model", help="model folder")
    parser.add_argument("--config", help="YAML file with the server's settings")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8000)
    return parser.parse_known_args()


def main() -> int:
    """Serve until told to stop; 0 then, else what ``vllm serve`` ended with."""
    arguments, rest = parse_arguments()
    problem = port_problem(arguments.host, arguments.port)
    if problem:
        print(f"serve: {problem}", file=sys.stderr)
        return 1
    address = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(arguments.host, arguments.host)
    url = f"http://{f'[{address}]' if ':' in address else address}:{arguments.port}"
    vllm = str(Path(sys.executable).with_name("vllm"))
    command = [vllm, "serve", arguments.model, "--host", arguments.host]
    command += ["--port", str(arguments.port)]
    command += ["--config", arguments.config] if arguments.config else []
    start = time.monotonic()
    server = Server([*command, *rest], url)
    if server.wait_ready():
        seconds = time.monotonic() - start
        print(f"\nserve: ready after {seconds:.0f} s. Ctrl-C stops it. Try:\n", flush=True)
        print(f"  {curl_line(server)}\n", flush=True)
        server.wait_end()
    server.stop()
    if server.stopping:
        print("\nserve: stopped", flush=True)
        return 0
    status = server.process.returncode
    print(f"serve: vllm serve ended with status {status}; see above.", file=sys.stderr)
    return status if status and status > 0 else 1


if __name__ == "__main__":
    sys.exit(main())
