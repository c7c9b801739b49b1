"""Counters of an int8 KV cache: written by workers, read by the process that answers ``/metrics``.

A worker's counters lie in a small shared file that the operators count into, so a step costs
nothing more; the server reads the files of all workers when it is asked.
"""

from __future__ import annotations

import struct
from typing import Final

import torch

from ascend_plugin.metrics_folder import files_of, new_file
from ascend_plugin.ops.page_layout import Quantisation

#: What is counted, in the order of the operators' counters. A row is a (token, kv head) of K or V.
NAMES: Final = ("rows", "saturated", "patched", "patch_overflows")

_KIND = "kv"
_VARIANTS = (Quantisation.C8D, Quantisation.C8S, Quantisation.C8P)
_COUNTS = len(_VARIANTS) * len(NAMES)
_HEAD = struct.Struct(f"={_COUNTS}q")


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
    path = new_file(_KIND, bytes(_HEAD.size) + model.encode())
    if path is None:
        return torch.zeros(len(_VARIANTS), len(NAMES), dtype=torch.int64)
    counts = torch.from_file(str(path), shared=True, size=_COUNTS, dtype=torch.int64)
    return counts.view(len(_VARIANTS), len(NAMES))


def read_counters() -> dict[tuple[str, str], tuple[int, ...]]:
    """Return the counts of all workers, added up.

    Returns:
        Counts in the order of :data:`NAMES`, by name of the model and of the variant.
    """
    totals: dict[tuple[str, str], tuple[int, ...]] = {}
    for path in files_of(_KIND):
        data = path.read_bytes()
        model, counts = data[_HEAD.size :].decode(), _HEAD.unpack_from(data)
        for row, quantisation in enumerate(_VARIANTS):
            own = counts[row * len(NAMES) : (row + 1) * len(NAMES)]
            if own[0]:  # variants that this worker uses
                key = (model, quantisation.name.lower())
                known = totals.get(key, (0,) * len(NAMES))
                totals[key] = tuple(a + b for a, b in zip(known, own, strict=True))
    return totals
