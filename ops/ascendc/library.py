"""Finds and loads the AscendC kernels of this machine, and says which there are.

On an NPU they are what CANN's compiler made (``cann.py``, in ``lib``). On the simulated NPU they
are their host models (``build.py``), compiled with g++ when they are first wanted and kept. Either
way a kernel is a function ``aclrtlaunch_<entry>``, launched by ``launch/launch.cpp``.
"""

from __future__ import annotations

import ctypes
import functools
import importlib.util
import logging
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from ..dispatch import Support
from ..sim.errors import SimulatorBuildError
from ..sim.options import OPTIONS_VARIABLE
from . import build, cann, glue

logger = logging.getLogger(__name__)

#: Debug switch, read when the kernels are first wanted: 0 leaves all of them out.
SWITCH = "ASCEND_PLUGIN_ASCENDC"

_VARIANTS = ("c8d", "c8s", "c8p")
_FLOATS = ("bf16", "fp16")

#: The entries of each source file in ``kernels``.
ENTRIES: dict[str, tuple[str, ...]] = {
    "kv_cache_write": tuple(
        f"kv_cache_write_{kind}_{dtype}" for kind in ("none", *_VARIANTS) for dtype in _FLOATS
    ),
    "kv_cache_gather": tuple(
        f"kv_cache_gather_{kind}_{dtype}" for kind in _VARIANTS for dtype in _FLOATS
    ),
    "paged_attention_c8": tuple(
        f"paged_attention_{kind}_{dtype}" for kind in _VARIANTS for dtype in _FLOATS
    ),
    "beam_topk": (
        "beam_topk_quantised",
        *(f"beam_topk_exact_{dtype}" for dtype in ("bf16", "fp16", "fp32")),
    ),
}

_REMEDY = (
    "build them where CANN is installed: source its set_env.sh and run make install DEVICE=npu, or "
    "python ops/ascendc/cann.py"
)


@dataclass(frozen=True, slots=True)
class Kernels:
    """The kernels that this process can launch.

    Attributes:
        entries: their names.
        missing: why others are not among them, by the name of the source file.
        source: where they come from, for the log.
    """

    entries: frozenset[str]
    missing: dict[str, str] = field(default_factory=dict)
    source: str = ""


def simulated() -> bool:
    """Return whether this process runs on a simulated NPU."""
    return bool(os.environ.get(OPTIONS_VARIABLE))


def why_missing() -> str:
    """Return why this machine has no kernels, without loading any; empty: it should have them."""
    if os.environ.get(SWITCH) == "0":
        return f"{SWITCH}=0 leaves the AscendC kernels out; unset it"
    built = all((cann.LIBRARY_DIR / name).is_file() for name in (cann.KERNELS, cann.LAUNCH))
    if simulated() or built:
        return ""
    return f"{cann.LIBRARY_DIR} has none; {_REMEDY}"


@functools.cache
def load() -> Kernels:
    """Load every kernel that there is; what is missing is no error, and is logged once."""
    missing = why_missing()
    if missing:
        return _without(missing)
    try:
        found = _load_models() if simulated() else _load_built()
    except (OSError, SimulatorBuildError) as error:
        return _without(f"the AscendC kernels do not load: {error}")
    logger.info("AscendC kernels: %d of %s.", len(found.entries), found.source)
    for name, reason in found.missing.items():
        logger.warning("AscendC kernel %s is missing: %s", name, reason)
    return found


def support(entry: str) -> Support:
    """Say whether a kernel can be launched, and why not.

    Args:
        entry: such as ``kv_cache_write_c8d_bf16``.
    """
    kernels = load()
    if entry in kernels.entries:
        return Support(True, f"the AscendC kernel {entry}")
    name = next((name for name, entries in ENTRIES.items() if entry in entries), "")
    return Support(False, kernels.missing.get(name, f"there is no AscendC kernel {entry}"))


def build_models(
    packages: Path, report: Callable[[str], None] = lambda line: None, force: bool = False
) -> list[Path]:
    """Compile all that the simulated NPU needs; at once if it is there.

    Args:
        packages: folder that holds ``torch_npu``.
        report: gets a line for each file that is compiled.
        force: compile although it is there.

    Returns:
        The libraries: that of the operators first.

    Raises:
        SimulatorBuildError: a compiler failed.
    """
    made = [glue.build(packages, report, force)]
    report("compiling the AscendC kernels' host models, where they are not yet")
    return [*made, *(_model(name) for name in ENTRIES)]


def _without(reason: str) -> Kernels:
    logger.warning("AscendC kernels are not used: %s.", reason)
    return Kernels(frozenset(), dict.fromkeys(ENTRIES, reason))


def _load_built() -> Kernels:
    """Load what CANN's compiler made."""
    kernels, launch = (cann.LIBRARY_DIR / name for name in (cann.KERNELS, cann.LAUNCH))
    torch.ops.load_library(str(launch))
    library = ctypes.CDLL(str(kernels), mode=os.RTLD_LOCAL | os.RTLD_NOW)
    entries: set[str] = set()
    missing: dict[str, str] = {}
    for name, wanted in ENTRIES.items():
        bound = set(_bind(library, wanted))
        entries |= bound
        if bound != set(wanted):
            missing[name] = f"{kernels} is of another version; {_REMEDY}"
    return Kernels(frozenset(entries), missing, str(kernels))


def _load_models() -> Kernels:
    """Load the host models of the kernels, compiled first if need be."""
    torch_npu = importlib.util.find_spec("torch_npu")
    if torch_npu is None or torch_npu.origin is None:
        raise SimulatorBuildError("torch_npu is not importable; run below ascend-plugin sim run.")
    packages = Path(torch_npu.origin).resolve().parent.parent
    logger.info("Loading the AscendC kernels' host models; the first time they are compiled.")
    torch.ops.load_library(str(glue.build(packages, logger.info)))
    # The models find the simulator's functions by dlsym among global symbols.
    ctypes.CDLL("libascendcl.so", mode=os.RTLD_GLOBAL | os.RTLD_NOLOAD)
    entries: set[str] = set()
    missing: dict[str, str] = {}
    for name, wanted in ENTRIES.items():
        try:
            library = ctypes.CDLL(str(_model(name)), mode=os.RTLD_LOCAL)
        except (OSError, SimulatorBuildError) as error:
            missing[name] = f"its host model does not build: {error}"
            continue
        entries |= set(_bind(library, wanted))
    return Kernels(frozenset(entries), missing, "the host model")


def _model(name: str) -> Path:
    """Return the library of a kernel's host model."""
    try:
        return build.library_path(name)
    except build.KernelBuildError as error:
        raise SimulatorBuildError(str(error)) from None


#: Loaded for good: their addresses are in use.
_libraries: list[Any] = []


def _bind(library: ctypes.CDLL, entries: tuple[str, ...]) -> Iterator[str]:
    """Tell the operators where the kernels of a library are; yield those that it has."""
    _libraries.append(library)
    for entry in entries:
        function = getattr(library, f"aclrtlaunch_{entry}", None)
        if function is not None:
            address = ctypes.cast(function, ctypes.c_void_p).value
            torch.ops.ascend_plugin_launch.bind(entry, address)
            yield entry
