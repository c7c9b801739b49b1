"""The command line as a user runs it: in a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

RunCli = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture
def run_cli(repository: Path) -> RunCli:
    """Run ``ascend-plugin`` with arguments; ``env`` adds variables, None removes one."""

    def run(
        *arguments: str | Path, env: dict[str, str | None] | None = None
    ) -> subprocess.CompletedProcess[str]:
        variables = {**os.environ, **(env or {})}
        return subprocess.run(
            [sys.executable, "-m", "ascend_plugin.cli", *map(str, arguments)],
            cwd=repository,
            env={name: value for name, value in variables.items() if value is not None},
            capture_output=True,
            text=True,
            timeout=500,
            check=False,
        )

    return run


@pytest.fixture
def make_distribution(tmp_path: Path) -> Callable[..., Path]:
    """Put a real package with metadata and entry points into a folder for ``PYTHONPATH``."""

    def make(name: str, version: str, code: str, entry_points: dict[str, str]) -> Path:
        module = name.replace("-", "_")
        (tmp_path / module).mkdir()
        (tmp_path / module / "__init__.py").write_text(code)
        info = tmp_path / f"{module}-{version}.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
        lines = [f"[{group}]\n{line}\n" for group, line in entry_points.items()]
        (info / "entry_points.txt").write_text("\n".join(lines))
        return tmp_path

    return make
