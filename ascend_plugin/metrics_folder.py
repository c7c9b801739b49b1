"""A folder in which processes of an engine leave numbers for the one that answers ``/metrics``.

Its name travels in an environment variable, which engines and workers inherit.
"""

from __future__ import annotations

import atexit
import itertools
import os
import shutil
import tempfile
from pathlib import Path

#: Set by the serving process, not by users.
FOLDER_VARIABLE = "ASCEND_PLUGIN_METRICS"

_serial = itertools.count()


def share_folder() -> None:
    """Make the folder of this process and of those that it starts. Idempotent."""
    if os.environ.get(FOLDER_VARIABLE):
        return
    folder = tempfile.mkdtemp(prefix="ascend-plugin-metrics-")
    os.environ[FOLDER_VARIABLE] = folder
    atexit.register(_remove, folder, os.getpid())


def _remove(folder: str, owner: int) -> None:
    if os.getpid() == owner:  # not in a forked child
        shutil.rmtree(folder, ignore_errors=True)


def new_file(kind: str, data: bytes) -> Path | None:
    """Write a file of this process; None: nobody will ask.

    Args:
        kind: of its content.
        data: what it begins with.
    """
    folder = os.environ.get(FOLDER_VARIABLE)
    if not folder or not os.path.isdir(folder):
        return None
    path = Path(folder) / f"{kind}-{os.getpid()}-{next(_serial)}"
    staged = path.with_suffix(".partial")
    staged.write_bytes(data)
    staged.rename(path)
    return path


def files_of(kind: str) -> list[Path]:
    """Return the complete files of a kind, of all processes."""
    folder = os.environ.get(FOLDER_VARIABLE)
    paths = sorted(Path(folder).glob(f"{kind}-*")) if folder else []
    return [path for path in paths if not path.suffix]
