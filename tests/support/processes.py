"""Python in processes of their own: real environments, real packages on the path."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path


def run_python(
    code: str,
    *arguments: str,
    path: tuple[Path, ...] = (),
    env: Mapping[str, str] | None = None,
    cwd: Path | None = None,
    timeout: float = 120,
) -> subprocess.CompletedProcess[str]:
    """Run code in a fresh interpreter.

    Args:
        code: what ``python -c`` runs.
        arguments: what it finds in ``sys.argv``.
        path: folders that come first on the path, as packages installed there would.
        env: variables beside those of this process.
        cwd: working folder; it is on the path as well.
        timeout: seconds.
    """
    return subprocess.run(
        [sys.executable, "-c", code, *arguments],
        env=environment(path, env),
        cwd=cwd or "/",
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )


def environment(
    path: tuple[Path, ...] = (), extra: Mapping[str, str] | None = None
) -> dict[str, str]:
    """Return this process' environment with folders put first on the path."""
    env = dict(os.environ)
    before = [env["PYTHONPATH"]] if env.get("PYTHONPATH") else []
    env["PYTHONPATH"] = os.pathsep.join([*map(str, path), *before])
    return env | dict(extra or {})
