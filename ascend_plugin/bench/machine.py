"""What a result depends on besides the code: versions, processor, memory and load.

Reads files of the kernel and package metadata only; never imports torch or vLLM.
"""

from __future__ import annotations

import os
import platform
import sys
import time
from importlib import metadata
from pathlib import Path

_HUGE_PAGES = Path("/sys/kernel/mm/transparent_hugepage/enabled")
_CACHES = Path("/sys/devices/system/cpu/cpu0/cache")
_UNITS = {"K": 2**10, "M": 2**20, "G": 2**30}

#: More running processes than this share of the CPUs disturb a measurement.
_BUSY_SHARE = 0.6

#: A guess for machines that do not tell: large enough for most.
_ASSUMED_CACHE = 32 * 2**20


def describe(threads: int, isa: str | None, load: float) -> dict[str, object]:
    """Return the ``meta`` object of a result.

    Args:
        threads: threads that the measured code used.
        isa: instruction set of the native kernels that ran, or would run.
        load: load average before the measurement, which raises it itself.
    """
    return {
        "versions": versions(),
        "cpu": cpu_model(),
        "isa": isa,
        "threads": threads,
        "cpus_available": available_cpus(),
        "load_average": load,
        "huge_pages": huge_pages() or "unknown",
        "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "argv": list(sys.argv),
    }


def load_average() -> float:
    """Return the average number of running processes during the last minute."""
    return round(os.getloadavg()[0], 2)


def busy_remark(load: float) -> str | None:
    """Return a warning when others keep this machine busy; None when it is quiet."""
    cpus = available_cpus()
    if load < _BUSY_SHARE * cpus:
        return None
    return (
        f"this machine is busy (load {load:g} on {cpus} CPUs): times are too long, and ratios of "
        "calls below a millisecond unreliable. Measure again when it is quiet."
    )


def versions() -> dict[str, str | None]:
    """Return the versions that a result belongs to; None for what is not installed."""
    names = ("ascend-plugin", "vllm", "torch")
    return {name: _version(name) for name in names} | {"python": platform.python_version()}


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def cpu_model(cpuinfo: Path = Path("/proc/cpuinfo")) -> str:
    """Return the processor's name with family and model, which tell clouds' vague names apart."""
    fields: dict[str, str] = {}
    for line in _lines(cpuinfo):
        key, _, value = line.partition(":")
        fields.setdefault(key.strip(), value.strip())
    name = fields.get("model name") or platform.processor() or platform.machine()
    numbers = [f"{key} {fields[key]}" for key in ("cpu family", "model") if key in fields]
    return f"{name} ({', '.join(numbers)})" if numbers else name


def available_cpus() -> int:
    """Return how many CPUs this process may use."""
    return len(os.sched_getaffinity(0))


def huge_pages(path: Path = _HUGE_PAGES) -> str | None:
    """Return the chosen setting of transparent huge pages; None where there is none."""
    words = " ".join(_lines(path)).split()
    return next((word[1:-1] for word in words if word.startswith("[")), None)


def last_level_cache_bytes(caches: Path = _CACHES) -> int:
    """Return the size of the largest cache that CPU 0 sees."""
    sizes = []
    for path in caches.glob("index*/size"):
        text = "".join(_lines(path))
        if text and text[-1] in _UNITS:
            sizes.append(int(text[:-1]) * _UNITS[text[-1]])
    return max(sizes, default=_ASSUMED_CACHE)


def available_memory(meminfo: Path = Path("/proc/meminfo")) -> int | None:
    """Return the bytes that can be allocated without swapping; None where unknown."""
    for line in _lines(meminfo):
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return None


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="utf-8").splitlines()
    except OSError:
        return []
