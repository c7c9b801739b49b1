"""Counters of an int8 KV cache: written by workers, read by the process that answers ``/metrics``.

A worker's counters lie in a small shared file that the operators count into, so a step costs
nothing more; the server reads the files of all workers when it is asked. The folder's name travels
in an environment variable, which workers inherit.
"""

from __future__ import annotations

import atexit
import itertools
import os
import shutil
import struct
import tempfile
from pathlib import Path
from typing import Final

import torch

from ascend_plugin.ops.page_layout import Quantisation

#: Set by the serving process, not by users.
FOLDER_VARIABLE = "ASCEND_PLUGIN_KV_COUNTERS"

#: What is counted, in the order of the operators' counters. A row is a (token, kv head) of K or V.
NAMES: Final = ("rows", "saturated", "patched", "patch_overflows")

_VARIANTS = (Quantisation.C8D, Quantisation.C8S, Quantisation.C8P)
_COUNTS = len(_VARIANTS) * len(NAMES)
_HEAD = struct.Struct(f"={_COUNTS}q")

_serial = itertools.count()


def share_counters() -> None:
    """Make the folder of this process and of those that it starts. Idempotent."""
    if os.environ.get(FOLDER_VARIABLE):
        return
    folder = tempfile.mkdtemp(prefix="ascend-plugin-kv-counters-")
    os.environ[FOLDER_VARIABLE] = folder
    atexit.register(_remove, folder, os.getpid())


def _remove(folder: str, owner: int) -> None:
    if os.getpid() == owner:  # not in a forked child
        shutil.rmtree(folder, ignore_errors=True)


class KVCounters:
    """Counters of one worker, one set per variant.

    Args:
        model: name under which the model is served.
    """

    def __init__(self, model: str) -> None:
        self._counts = _shared(model)

    def of(self, quantisation: Quantisation) -> torch.Tensor:
        """Return the counters that operators count into.

        Returns:
            int64 ``[4]``, in the order of :data:`NAMES`.
        """
        return self._counts[_VARIANTS.index(quantisation)]


def _shared(model: str) -> torch.Tensor:
    folder = os.environ.get(FOLDER_VARIABLE)
    if not folder or not os.path.isdir(folder):  # nobody will ask
        return torch.zeros(len(_VARIANTS), len(NAMES), dtype=torch.int64)
    path = Path(folder) / f"{os.getpid()}-{next(_serial)}"
    staged = path.with_suffix(".partial")
    staged.write_bytes(bytes(_HEAD.size) + model.encode())
    counts = torch.from_file(str(staged), shared=True, size=_COUNTS, dtype=torch.int64)
    staged.rename(path)
    return counts.view(len(_VARIANTS), len(NAMES))


def read_counters() -> dict[tuple[str, str], tuple[int, ...]]:
    """Return the counts of all workers, added up.

    Returns:
        Counts in the order of :data:`NAMES`, by name of the model and of the variant.
    """
    folder = os.environ.get(FOLDER_VARIABLE)
    totals: dict[tuple[str, str], tuple[int, ...]] = {}
    for path in sorted(Path(folder).glob("*-*")) if folder else []:
        if path.suffix:  # not complete yet
            continue
        data = path.read_bytes()
        model, counts = data[_HEAD.size :].decode(), _HEAD.unpack_from(data)
        for row, quantisation in enumerate(_VARIANTS):
            own = counts[row * len(NAMES) : (row + 1) * len(NAMES)]
            if own[0]:  # variants that this worker uses
                key = (model, quantisation.name.lower())
                known = totals.get(key, (0,) * len(NAMES))
                totals[key] = tuple(a + b for a, b in zip(known, own, strict=True))
    return totals
