"""Environments of the tools: one virtual environment each, pinned, made once, in the cache.

A tool's file in ``configs/quant/environments`` lists every package with its version, so nothing is
resolved, and a CPU build of torch stays one. An interrupted installation goes on where it stopped.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from ascend_plugin.weight_tools.errors import WeightToolError

#: Another cache folder.
CACHE_VARIABLE = "ASCEND_PLUGIN_QUANT_CACHE"

#: Where torch's CPU builds are, if pip's own sources have none.
TORCH_CPU_INDEX = "https://download.pytorch.org/whl/cpu"

#: Installed before all others.
_FIRST = ("torch", "setuptools", "wheel")

_PINS = Path(__file__).resolve().parents[1] / "configs" / "quant" / "environments"

#: Called with what is being done, how much of it is done, and the total.
Progress = Callable[[str, int, int], None]


def cache_folder() -> Path:
    """Return the folder that holds the tools' environments."""
    chosen = os.environ.get(CACHE_VARIABLE)
    if chosen:
        return Path(chosen).expanduser().absolute()
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base, "ascend-plugin", "quant")


def tools() -> tuple[str, ...]:
    """Return the tools that there are environments for."""
    return tuple(sorted(path.stem for path in _PINS.glob("*.txt")))


@dataclass(frozen=True, slots=True)
class ToolEnvironment:
    """The environment of one tool, made or not.

    Attributes:
        tool: its name.
        pins: file with every package and its version.
        folder: of the virtual environment.
    """

    tool: str
    pins: Path
    folder: Path

    @classmethod
    def of(cls, tool: str) -> ToolEnvironment:
        """Name the environment of a tool; other pins make another one.

        Raises:
            WeightToolError: the tool is unknown.
        """
        pins = _PINS / f"{tool}.txt"
        if not pins.is_file():
            raise WeightToolError(f"tool {tool!r} is unknown; use one of {', '.join(tools())}.")
        digest = hashlib.sha256(pins.read_bytes() + sys.version.encode()).hexdigest()[:12]
        return cls(tool, pins, cache_folder() / f"{tool}-{digest}")

    @property
    def python(self) -> Path:
        """The interpreter."""
        return self.folder / "bin" / "python"

    @property
    def log(self) -> Path:
        """What the installation printed."""
        return self.folder.with_name(f"{self.folder.name}.log")

    def versions(self) -> dict[str, str]:
        """Return the pinned versions by package."""
        return dict(line.split("==", 1) for line in self._lines())

    def make(self, report: Progress) -> Path:
        """Install what is missing, at once if nothing is; return the interpreter.

        Raises:
            WeightToolError: it cannot be installed; the message says what to do.
        """
        steps = self._steps()
        with _lock(self.folder):
            for i, (name, action) in enumerate(steps):
                stamp = self.folder / f".{name}.done"
                if not stamp.is_file():
                    report(f"environment of {self.tool}: {name}", i, len(steps))
                    action()
                    stamp.touch()
        return self.python

    def _steps(self) -> Sequence[tuple[str, Callable[[], None]]]:
        return (
            ("venv", lambda: self._must([sys.executable, "-m", "venv", str(self.folder)])),
            ("torch", self._install_torch),
            ("packages", self._install_packages),
        )

    def _lines(self) -> list[str]:
        lines = (line.partition("#")[0].strip() for line in self.pins.read_text().splitlines())
        return [line for line in lines if line]

    def _install_torch(self) -> None:
        # With torch, what source distributions are built with: they are built below without pip's
        # isolation, which would fetch a torch of its own, for CUDA.
        first = [line for line in self._lines() if line.partition("==")[0] in _FIRST]
        pip = [str(self.python), "-m", "pip", "install", "--no-deps", *first]
        if not self._attempt(pip):
            self._must([*pip, "--extra-index-url", TORCH_CPU_INDEX])

    def _install_packages(self) -> None:
        # Every dependency is listed, so pip resolves nothing and replaces no torch.
        options = ("--no-deps", "--no-build-isolation", "-r", str(self.pins))
        self._must([str(self.python), "-m", "pip", "install", *options])

    def _must(self, command: Sequence[str]) -> None:
        if not self._attempt(command):
            raise WeightToolError(
                f"the environment of {self.tool} cannot be installed into {self.folder}: "
                f"{' '.join(command)} failed.\n{tail(self.log)}\n"
                "If there is no network, make a package index reachable (PIP_INDEX_URL, or "
                "PIP_FIND_LINKS=/folder with the wheels); then run the same command again, it "
                "goes on from here."
            )

    def _attempt(self, command: Sequence[str]) -> bool:
        environment = isolated() | {"PIP_DISABLE_PIP_VERSION_CHECK": "1", "PIP_NO_INPUT": "1"}
        with self.log.open("ab") as log:
            done = subprocess.run(
                command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=environment,
                check=False,
            )
        return done.returncode == 0


def isolated() -> dict[str, str]:
    """Return this process' environment without what would lead another Python to our packages."""
    ours = ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV", "__PYVENV_LAUNCHER__")
    return {name: value for name, value in os.environ.items() if name not in ours}


def tail(log: Path, lines: int = 15) -> str:
    """Return the end of a log, and where all of it is."""
    try:
        text = log.read_text(errors="replace").splitlines()[-lines:]
    except OSError:
        text = []
    end = "\n".join(f"    {line[:300]}" for line in text)
    return f"The end of {log}:\n{end}"


@contextmanager
def _lock(folder: Path) -> Iterator[None]:
    """Keep two installations out of one environment."""
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        handle = folder.with_name(f"{folder.name}.lock").open("w")
    except OSError as error:
        raise WeightToolError(
            f"the cache folder {folder.parent} cannot be written ({error.strerror}); set "
            f"{CACHE_VARIABLE} to a folder that can."
        ) from error
    with handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
