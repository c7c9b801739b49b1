"""The directory of a converted checkpoint: its manifest, its state, its replacement.

A checkpoint is written into a hidden directory beside its destination and renamed when it is
complete, so that a reader sees the old one, the new one or none, and never a half-made one.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from ascend_plugin.model.errors import ModelDestinationError
from ascend_plugin.model.gguf_source import ModelSource, Progress, sha256_of

MANIFEST = "ascend_plugin_model.json"
CONVERTER_VERSION = 1
"""Raise it when the files change: checkpoints of another version are made again."""

_SPARE_BYTES = 16 << 20
_NO_SPACE = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


@dataclass(frozen=True, slots=True)
class FileRecord:
    """One file of a checkpoint."""

    file: str
    bytes: int
    sha256: str


@dataclass(frozen=True, slots=True)
class State:
    """What a destination holds.

    ``absent``: nothing. ``complete``: an intact checkpoint of the wanted source. ``stale``: a
    checkpoint of this converter that is damaged or of another version. ``foreign``: files that
    this converter did not write. `reason` completes a sentence about the last two.
    """

    kind: Literal["absent", "complete", "stale", "foreign"]
    reason: str = ""
    files: tuple[FileRecord, ...] = ()


def inspect(directory: Path, source: ModelSource, names: frozenset[str]) -> State:
    """Says what is in a destination; reads every byte (0.2 s for SmolLM2).

    Args:
        directory: The destination.
        source: The source that the checkpoint should be of.
        names: The files that a checkpoint consists of, without the manifest.

    Raises:
        ModelDestinationError: If `directory` is a file.
        OSError: If it cannot be read.
    """
    if not directory.exists():
        return State("absent")
    if not directory.is_dir():
        raise ModelDestinationError(f"{directory} is a file: name a directory for the model.")
    present = {entry.name for entry in directory.iterdir()}
    if not present:
        return State("absent")
    if MANIFEST not in present:
        return State("foreign", f"has files and no {MANIFEST}")
    files, damage = _check(directory, source, names)
    if not damage:
        return State("complete", files=files)
    unknown = sorted(present - names - {MANIFEST})
    if unknown:
        return State("foreign", f"{damage}, and also has a file {unknown[0]!r} of another origin")
    return State("stale", damage)


def _check(
    directory: Path, source: ModelSource, names: frozenset[str]
) -> tuple[tuple[FileRecord, ...], str]:
    """Returns the files of the manifest, and what is wrong with them ("" if nothing is)."""
    try:
        manifest = json.loads((directory / MANIFEST).read_text())
        files = tuple(FileRecord(**row) for row in manifest["files"])
        made_by, made_of = manifest["converter_version"], manifest["source"]
    except (ValueError, KeyError, TypeError):
        return (), f"has an unreadable {MANIFEST}"
    damage = ""
    if made_by != CONVERTER_VERSION:
        damage = f"is of converter version {made_by}, this is version {CONVERTER_VERSION}"
    elif made_of != _source_record(source):
        damage = f"was not made of {source.requirement} with SHA-256 {source.sha256}"
    elif {record.file for record in files} != names:
        damage = f"has a {MANIFEST} that lists other files"
    return files, damage or next(filter(None, (_damage(directory, f) for f in files)), "")


def _damage(directory: Path, record: FileRecord) -> str:
    """Returns what is wrong with one file, "" if it is as recorded."""
    path = directory / record.file
    if not path.is_file():
        return f"lacks {record.file}"
    if path.stat().st_size != record.bytes or sha256_of(path) != record.sha256:
        return f"has a damaged {record.file}"
    return ""


def write_files(
    directory: Path, contents: Mapping[str, bytes], source: ModelSource, progress: Progress
) -> tuple[FileRecord, ...]:
    """Writes the files of a checkpoint and its manifest into a new directory.

    There is no fsync: a file lost by a power failure is found by `inspect` and made again.
    """
    directory.mkdir()
    records = []
    for done, (name, data) in enumerate(contents.items()):
        progress(f"writing {name}", done, len(contents))
        (directory / name).write_bytes(data)
        records.append(FileRecord(name, len(data), hashlib.sha256(data).hexdigest()))
    manifest: dict[str, Any] = {
        "converter_version": CONVERTER_VERSION,
        "source": _source_record(source),
        "files": [asdict(record) for record in records],
    }
    (directory / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n")
    return tuple(records)


def _source_record(source: ModelSource) -> dict[str, str]:
    return {
        "distribution": source.distribution,
        "version": source.version,
        "member": source.member,
        "sha256": source.sha256,
        "license": source.license,
    }


@contextlib.contextmanager
def locked_parent(destination: Path, progress: Progress) -> Iterator[None]:
    """Makes the parent of a destination and holds it for one conversion at a time.

    The lock is on the parent directory itself, so it leaves no file behind. Working
    directories of conversions that were killed are removed first, and directories made here
    are removed again if the conversion fails.
    """
    parent = destination.parent
    made = [path for path in (parent, *parent.parents) if not path.exists()]
    try:
        parent.mkdir(parents=True, exist_ok=True)
        handle = os.open(parent, os.O_RDONLY)
        try:
            if _lock(handle, lambda: progress(f"waiting for another conversion in {parent}", 0, 0)):
                for left_over in parent.glob(_work_prefix(destination) + "*"):
                    shutil.rmtree(left_over, ignore_errors=True)
            yield
        finally:
            os.close(handle)
    except BaseException:
        for path in made:
            with contextlib.suppress(OSError):
                path.rmdir()
        raise


def _lock(handle: int, when_busy: Callable[[], None]) -> bool:
    """Waits for the exclusive lock; False if the file system (some NFS) has no locks."""
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        when_busy()
        fcntl.flock(handle, fcntl.LOCK_EX)
    except OSError:
        return False
    return True


@contextlib.contextmanager
def work_directory(destination: Path) -> Iterator[Path]:
    """Makes a directory beside the destination, on the same disk, and removes it at the end."""
    with tempfile.TemporaryDirectory(
        prefix=_work_prefix(destination), dir=destination.parent, ignore_cleanup_errors=True
    ) as work:
        yield Path(work)


def _work_prefix(destination: Path) -> str:
    return f".{destination.name}.partial-"


def publish(staged: Path, destination: Path, keep_old: bool) -> Path | None:
    """Renames a complete checkpoint to its destination.

    Args:
        staged: The checkpoint, inside the working directory.
        destination: Absent or a directory.
        keep_old: Whether to keep a previous, not empty directory under another name; else it
            goes into the working directory and so away.

    Returns:
        The new name of a kept directory.
    """
    if not destination.exists() or not any(destination.iterdir()):
        staged.rename(destination)
        return None
    aside = _unused_name(destination) if keep_old else staged.parent / "old"
    destination.rename(aside)
    try:
        staged.rename(destination)
    except BaseException:
        aside.rename(destination)
        raise
    return aside if keep_old else None


def _unused_name(destination: Path) -> Path:
    number = 1
    while (name := destination.with_name(f"{destination.name}.replaced-{number}")).exists():
        number += 1
    return name


def require_space(destination: Path, needed: int) -> None:
    """Raises unless the disk of the destination has room for `needed` bytes and a little more.

    Raises:
        ModelDestinationError: If it has not.
    """
    free = shutil.disk_usage(destination.parent).free
    if free < needed + _SPARE_BYTES:
        raise ModelDestinationError(
            f"{destination.parent} has {_megabytes(free)} free, "
            f"{_megabytes(needed + _SPARE_BYTES)} are needed: "
            "free some space or name a directory on another disk."
        )


def destination_error(err: OSError, destination: Path) -> ModelDestinationError:
    """Turns an error of the file system into one sentence."""
    what = f"{destination} cannot be written ({err.strerror or err})"
    if err.errno in _NO_SPACE:
        return ModelDestinationError(
            f"{what}: free some space or name a directory on another disk."
        )
    return ModelDestinationError(f"{what}: name a directory that you can write and replace.")


def _megabytes(size: int) -> str:
    return f"{size / 1e6:.0f} MB"
