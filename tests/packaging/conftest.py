"""A copy of the checkout, and what is built and installed from it."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import venv
from collections.abc import Callable
from pathlib import Path

import pytest

# Not copied: what git ignores, and what is large.
IGNORED = (
    ".venv",
    ".git",
    "models",
    "build",
    "dist",
    "__pycache__",
    "*.egg-info",
    "*.so",
    ".*cache",
    # Other tests write these meanwhile.
    ".hypothesis",
    ".coverage*",
)

Run = Callable[..., subprocess.CompletedProcess[str]]


def run_command(
    command: list[str | Path], cwd: Path, check: bool = True, **env: str
) -> subprocess.CompletedProcess[str]:
    """Run a command with stdout and stderr in one text."""
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    done = subprocess.run(
        [str(word) for word in command],
        cwd=cwd,
        env={**environment, **env},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    assert not check or done.returncode == 0, f"{command} failed:\n{done.stdout}"
    return done


@pytest.fixture(scope="session")
def run() -> Run:
    return run_command


@pytest.fixture(scope="session")
def tree(repository: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the sources, symlinks kept, with a stale library that no wheel may take up."""
    target = tmp_path_factory.mktemp("checkout") / "ascend"
    shutil.copytree(repository, target, symlinks=True, ignore=shutil.ignore_patterns(*IGNORED))
    stale = target / "ops" / "native" / "lib" / "libascend_cpu_stale.so"
    stale.parent.mkdir(parents=True, exist_ok=True)
    stale.write_bytes(b"from an earlier build")
    return target


@pytest.fixture(scope="session")
def built(tree: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder with the sdist, and with the wheel built from the sdist."""
    out = tmp_path_factory.mktemp("dist")
    run_command([sys.executable, "-m", "build", "--no-isolation", "--outdir", out, tree], out)
    return out


@pytest.fixture(scope="session")
def make_environment(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Make an environment that sees this one's packages, but not its editable install."""

    def make(*requirement: str | Path, **env: str) -> Path:
        folder = tmp_path_factory.mktemp("environment")
        venv.create(folder, with_pip=False)
        site = folder / "lib" / f"python{sysconfig.get_python_version()}" / "site-packages"
        # A path from a .pth file is searched last, and its own .pth files are not read: those
        # would bring in the checkout.
        (site / "shared.pth").write_text(sysconfig.get_path("purelib"))
        pip = [sys.executable, "-m", "pip", "--python", folder / "bin" / "python"]
        options = ["install", "--no-deps", "--no-build-isolation", "--force-reinstall"]
        run_command([*pip, *options, *requirement], folder, **env)
        return folder

    return make


@pytest.fixture(scope="session")
def installed(built: Path, make_environment: Callable[..., Path]) -> Path:
    """An environment with the wheel."""
    return make_environment(next(built.glob("*.whl")))
