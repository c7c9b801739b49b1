"""The command line itself: start, help, version, errors."""

from __future__ import annotations

import subprocess
import sys
import time
from importlib import metadata

import pytest


def test_help_names_every_command(run_cli):
    done = run_cli("--help")
    assert done.returncode == 0
    for command in ("model", "bench", "doctor", "--version", "--debug"):
        assert command in done.stdout


@pytest.mark.parametrize("arguments", [("bench",), ("bench", "attention"), ("doctor",), ("model",)])
def test_help_of_a_command(run_cli, arguments):
    done = run_cli(*arguments, "--help")
    assert done.returncode == 0
    assert "Usage" in done.stdout


def test_version(run_cli):
    done = run_cli("--version")
    assert done.stdout.strip() == metadata.version("ascend-plugin")


@pytest.mark.parametrize("module", ["main", "tables"])
def test_the_command_line_starts_without_torch_and_vllm(module):
    code = (
        f"import sys, ascend_plugin.cli.{module}\n"
        "heavy = {'torch', 'vllm', 'transformers', 'matplotlib', 'torch_npu'}\n"
        "print(sorted(heavy & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_help_is_quick(run_cli):
    # 0.3 s on a quiet machine; the bound only tells it from an import of torch on a busy one.
    fastest = min(_seconds(run_cli) for _ in range(3))
    assert fastest < 2.0


def _seconds(run_cli) -> float:
    start = time.perf_counter()
    assert run_cli("--help").returncode == 0
    return time.perf_counter() - start


def test_an_error_is_one_sentence_and_a_traceback_only_with_debug(run_cli):
    arguments = ("bench", "attention", "--batch", "0")
    done = run_cli(*arguments)
    assert done.returncode == 1
    assert done.stdout == ""
    assert done.stderr == "Error: --batch 0 must be at least 1.\n"
    debug = run_cli("--debug", *arguments)
    assert debug.returncode == 1
    assert "Traceback" in debug.stderr


def test_wrong_usage_has_exit_code_2(run_cli):
    done = run_cli("bench", "attention", "--isa", "sse")
    assert done.returncode == 2
    assert "avx512" in done.stderr
