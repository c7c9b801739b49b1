"""Stages of an installation: run once, remembered by a stamp, resumed after an interruption."""

from __future__ import annotations

import hashlib
import os
import subprocess
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path


class InstallError(Exception):
    """Something the person at the keyboard has to change; the text says what."""


@dataclass(frozen=True)
class Stage:
    """One step of the installation.

    Attributes:
        name: short, also the name of its stamp and its log.
        summary: what it does, in one line.
        key: digest of everything it depends on; another key means run it again.
        action: does it; may be repeated after an interruption.
        present: whether its result is (still) there; cheap.
    """

    name: str
    summary: str
    key: str
    action: Callable[[], None]
    present: Callable[[], bool]


def digest(*parts: str | Path) -> str:
    """Hash strings and the contents of files and folders (missing ones count as missing)."""
    state = hashlib.sha256()
    for part in parts:
        for name, content in _contents(part):
            state.update(f"{name}\0{len(content)}\0".encode())
            state.update(content)
    return state.hexdigest()


def _contents(part: str | Path) -> Iterable[tuple[str, bytes]]:
    if isinstance(part, str):
        yield "", part.encode()
    elif part.is_dir():
        for path in sorted(p for p in part.rglob("*") if p.is_file()):
            yield str(path.relative_to(part)), path.read_bytes()
    else:
        yield part.name, part.read_bytes() if part.exists() else b"missing"


class Runner:
    """Runs commands for the stages and keeps their output in log files.

    Args:
        folder: receives ``<stage>.log`` and ``<stage>.stamp``.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._log = folder / "install.log"

    def begin(self, stage: str) -> None:
        """Send what follows to the log of ``stage``."""
        self.folder.mkdir(parents=True, exist_ok=True)
        self._log = self.folder / f"{stage}.log"
        self._log.write_text("")

    def attempt(self, command: Sequence[str | Path], **env: str) -> bool:
        """Run a command and say whether it succeeded."""
        with self._log.open("ab") as log:
            log.write(f"$ {' '.join(str(word) for word in command)}\n".encode())
            log.flush()
            done = subprocess.run(
                [str(word) for word in command],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env={**os.environ, **env},
                # Not the checkout: Python would find the bare folders ops/ and packaging/ there.
                cwd=self.folder,
                check=False,
            )
        return done.returncode == 0

    def run(self, command: Sequence[str | Path], **env: str) -> None:
        """Run a command; when it fails, raise with the end of its output."""
        if not self.attempt(command, **env):
            raise InstallError(f"a command failed. {self.tail()}")

    def tail(self, lines: int = 25) -> str:
        """Return the end of the current log, and where all of it is."""
        text = self._log.read_text(errors="replace").splitlines()[-lines:]
        end = "\n".join(f"    {line[:300]}" for line in text)
        return f"The end of {self._log}:\n{end}"


def pending(stages: Sequence[Stage], folder: Path) -> list[Stage]:
    """Return the stages that are not done, or whose inputs or results have changed."""
    return [stage for stage in stages if not _done(stage, folder)]


def _done(stage: Stage, folder: Path) -> bool:
    stamp = folder / f"{stage.name}.stamp"
    return stamp.is_file() and stamp.read_text() == stage.key and stage.present()


def run_stages(stages: Sequence[Stage], runner: Runner, say: Callable[..., None]) -> int:
    """Run the pending stages in order.

    Args:
        stages: all of them.
        runner: for logs and stamps.
        say: ``print``, flushed.

    Returns:
        How many ran.

    Raises:
        InstallError: a stage failed; those before it are stamped and will not run again.
    """
    todo = pending(stages, runner.folder)
    width = max(len(stage.name) for stage in stages)
    for number, stage in enumerate(stages, start=1):
        if stage not in todo:
            continue
        say(f"[{number}/{len(stages)}] {stage.name:<{width}}  {stage.summary} ...", end="")
        start = time.monotonic()
        try:
            (runner.folder / f"{stage.name}.stamp").unlink(missing_ok=True)
            stage.action()
        except BaseException:
            say(" stopped")
            raise
        runner.folder.mkdir(parents=True, exist_ok=True)
        (runner.folder / f"{stage.name}.stamp").write_text(stage.key)
        say(f" {time.monotonic() - start:.1f} s")
    return len(todo)
