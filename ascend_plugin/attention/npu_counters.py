"""Counters of KV writes on an NPU, carried to the host without waiting for the device.

Kernels add to rows on the device, one per core. Now and then a step enqueues a copy of them to
pinned memory; a later step that finds the copy done adds the rows up into the counters that
``/metrics`` reads. So the numbers there are a step late at least, and never cost a synchronisation.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Any

import torch

from ascend_plugin.ops.npu import ascendc
from ascend_plugin.ops.npu.device import npu

#: Seconds between copies.
PERIOD = 0.25


@dataclass(slots=True)
class DeviceCounters:
    """The counters of one variant.

    Attributes:
        host: int64 ``[4]``, where the sums go, see :mod:`ascend_plugin.kv_cache.counters`.
        device: int64 ``[vector cores, 4]``, which the kernels add to.
        copy: pinned memory for ``device``.
        copied: recorded behind the copy that is under way, or None.
        due: when the next copy may begin.
    """

    host: torch.Tensor
    device: torch.Tensor
    copy: torch.Tensor
    copied: Any = None
    due: float = field(default_factory=time.monotonic)

    @classmethod
    def of(cls, host: torch.Tensor, device: torch.device) -> DeviceCounters:
        """Return counters on a device, all zero, for counters on the host."""
        shape = (ascendc.cores_of(device).vector, host.shape[0])
        counts = torch.zeros(shape, dtype=torch.int64, device=device)
        return cls(host, counts, torch.zeros(shape, dtype=torch.int64).pin_memory())

    def follow(self) -> None:
        """Take over a copy that is done, and begin the next one when it is due."""
        if self.copied is not None:
            if not self.copied.query():
                return
            self.copied = None
            self.host.copy_(self.copy.sum(0))
        now = time.monotonic()
        if now >= self.due:
            self.due = now + PERIOD
            self.copy.copy_(self.device, non_blocking=True)
            self.copied = npu.Event()
            self.copied.record()


#: Of this process, by the address of the host's counters: layers of a variant share them.
_known: dict[int, DeviceCounters] = {}


def device_counters(host: torch.Tensor | None, device: torch.device) -> torch.Tensor | None:
    """Return the device's rows for counters of the host; None if nobody counts."""
    if host is None:
        return None
    known = _known.get(host.data_ptr())
    if known is None or known.device.device != device:
        known = _known[host.data_ptr()] = DeviceCounters.of(host, device)
    return known.device


def follow_counters() -> None:
    """Bring the host's counters up to date as far as that costs no waiting; call it every step."""
    for counters in _known.values():
        counters.follow()


def forget_counters() -> None:
    """Drop the counters of an engine that is gone: another one may get its addresses."""
    _known.clear()
