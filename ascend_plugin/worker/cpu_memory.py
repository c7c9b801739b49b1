"""What loading a model takes: time, and memory beside the bytes of the checkpoint."""

from __future__ import annotations

import ctypes
import logging
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from ascend_plugin.ops.native import memory
from ascend_plugin.quantization.errors import CheckpointError
from ascend_plugin.quantization.tensors import read_index

logger = logging.getLogger(__name__)

_MIB = 2**20
_STATUS = Path("/proc/self/status")

#: C functions by which allocators give memory that is free back to the system, with an argument
#: each: glibc's, and that of TCMalloc, which vLLM preloads where it has it.
_RELEASES = (("malloc_trim", 0), ("MallocExtension_ReleaseFreeMemory", None))


@dataclass(frozen=True, slots=True)
class LoadReport:
    """What loading a model took.

    Attributes:
        seconds: until weights are in the kernels' order and on huge pages, draft layers' included.
        resident_bytes: what the process holds more than before, as :func:`resident_bytes` counts.
            None: unknown.
        checkpoint_bytes: of all tensors in the checkpoint's files, whatever the number of
            processes that share them. None: unknown.
    """

    seconds: float
    resident_bytes: int | None
    checkpoint_bytes: int | None

    def describe(self) -> str:
        """Return it as a sentence."""
        said = [f"Loading took {self.seconds:.1f} s"]
        if self.resident_bytes is not None:
            said.append(f"and {self.resident_bytes / _MIB:.1f} MiB of memory")
        if self.checkpoint_bytes is not None:
            said.append(f"for {self.checkpoint_bytes / _MIB:.1f} MiB of tensors in the checkpoint")
        return f"{' '.join(said)}."


def measure_load(load: Callable[[], None], checkpoint: Path | None) -> LoadReport:
    """Load a model; log and return what that took.

    Args:
        load: does it.
        checkpoint: folder of the model's files; None: weights come from elsewhere.
    """
    before, start = resident_bytes(), time.perf_counter()
    load()
    seconds, after = time.perf_counter() - start, resident_bytes()
    grown = None if before is None or after is None else after - before
    report = LoadReport(seconds, grown, _tensor_bytes(checkpoint))
    logger.info("%s", report.describe())
    return report


def use_huge_pages(models: Iterable[torch.nn.Module]) -> None:
    """Move the weights of models to huge pages; log how much of them.

    A decode step streams all weights; with 4 KiB pages of memory the TLB misses cost a fifth of
    that.
    """
    tensors = [tensor for model in models for tensor in _tensors(model)]
    start = time.perf_counter()
    moved, seconds = memory.collapse_into_huge_pages(tensors), time.perf_counter() - start
    logger.info("%.1f MiB of weights are on huge pages (%.1f s).", moved / _MIB, seconds)


def _tensors(model: torch.nn.Module) -> Iterator[torch.Tensor]:
    """Yield weights; those in a kernel's own order are attributes, or fields of attributes."""
    yield from model.parameters()
    yield from model.buffers()
    for module in model.modules():
        for value in vars(module).values():
            yield from memory.tensors_in(value)


def resident_bytes() -> int | None:
    """Return the memory that this process holds and no file backs; None: the system does not tell.

    The allocator gives back what is free first. Mapped files are the system's to drop: what a
    loader has read through one does not count.
    """
    if not sys.platform.startswith("linux"):
        return None
    _release_free_memory()
    fields = dict(line.split(":", 1) for line in _STATUS.read_text().splitlines())
    kibibytes = (int(fields[name].split()[0]) for name in ("RssAnon", "RssShmem"))
    return sum(kibibytes) * 1024


def _release_free_memory() -> None:
    """Give memory that was freed back to the system, where the allocator has a function for it."""
    library = ctypes.CDLL(None)
    for name, argument in _RELEASES:
        function = getattr(library, name, None)
        if function is not None:
            function(*([] if argument is None else [ctypes.c_size_t(argument)]))


def _tensor_bytes(checkpoint: Path | None) -> int | None:
    if checkpoint is None or not checkpoint.is_dir():
        return None
    try:
        return sum(info.nbytes for info in read_index(checkpoint).values())
    except CheckpointError:  # of a kind that vLLM reads by itself
        return None
