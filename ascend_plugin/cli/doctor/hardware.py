"""Checks of the processor, memory and tools around the kernels."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ascend_plugin.bench import machine
from ascend_plugin.cli.doctor.check import Check, ok

if TYPE_CHECKING:
    from ascend_plugin.ops.native.loader import IsaStatus

#: In the order in which torch.compile looks for them when CXX is not set.
_COMPILERS = ("g++", "clang++", "c++")


def check_processor() -> list[Check]:
    """Name the processor and how much of it this process may use."""
    cpus = machine.available_cpus()
    load = os.getloadavg()[0]
    return [ok("processor", f"{machine.cpu_model()}, {cpus} CPU(s) available, load {load:.1f}")]


def check_instruction_sets(statuses: Sequence[IsaStatus], chosen: str | None) -> list[Check]:
    """Say which kernel libraries exist and run, and which is taken.

    Args:
        statuses: what the loader knows, best first.
        chosen: the instruction set that it loads; None: none.
    """
    rows = []
    for isa in statuses:
        name = f"instruction set {isa.name}"
        if isa.runnable:
            rows.append(ok(name, "chosen" if isa.name == chosen else "built, runs here"))
        else:
            state = "built, but cannot run" if isa.built else "not built"
            rows.append(ok(name, f"{state}: {isa.reason}"))
    if chosen is None:
        detail = "no kernel library runs here: operators run in plain torch, many times slower"
        remedy = "Build them: pip install -e . (or python -m ascend_plugin.ops.native)."
        rows.append(Check("native kernels", "problem", detail, remedy))
    return rows


def check_huge_pages(setting: str | None) -> list[Check]:
    """Check that the KV cache and weights can get huge pages.

    Args:
        setting: of transparent huge pages; None: this kernel has none.
    """
    name = "transparent huge pages"
    if setting in ("madvise", "always"):
        return [ok(name, f"{setting}: the KV cache gets them, from Linux 6.1 on weights too")]
    detail = f"{setting or 'not available'}: decode is 10 to 30 % slower without them"
    remedy = "Run as root: echo madvise > /sys/kernel/mm/transparent_hugepage/enabled"
    return [Check(name, "warning", detail, remedy)]


def check_preload(environment: Mapping[str, str] = os.environ) -> list[Check]:
    """Check that every library named in ``LD_PRELOAD`` is there."""
    value = environment.get("LD_PRELOAD", "")
    missing = [path for path in value.split(":") if "/" in path and not Path(path).exists()]
    if missing:
        detail = f"{value}: {', '.join(missing)} does not exist, so the loader ignores it"
        return [Check("LD_PRELOAD", "warning", detail, "Correct the path or unset LD_PRELOAD.")]
    return [ok("LD_PRELOAD", value or "not set: vLLM sets it for its workers")]


def check_compiler(
    environment: Mapping[str, str] = os.environ, which: Callable[[str], str | None] = shutil.which
) -> list[Check]:
    """Look for the C++ compiler that torch.compile calls when a model is loaded."""
    name = "C++ compiler for torch.compile"
    wanted = [environment["CXX"]] if environment.get("CXX") else list(_COMPILERS)
    found = next((path for path in map(which, wanted) if path), None)
    if found:
        return [ok(name, found)]
    detail = f"none of {', '.join(wanted)} is found"
    remedy = "Install one (Debian: apt install g++), or serve with --enforce-eager."
    return [Check(name, "warning", detail, remedy)]
