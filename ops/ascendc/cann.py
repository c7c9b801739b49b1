#!/usr/bin/env python3
"""Builds the AscendC kernels with CANN's compiler: ``python ops/ascendc/cann.py``.

``make install DEVICE=npu`` runs it; without CANN it says so in one line and does nothing. Only the
standard library is used and nothing of the package is imported, because ``import torch`` would load
torch_npu and with it the driver. Never run with the real compiler yet: see docs/hardware.md.
"""

from __future__ import annotations

import ctypes
import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

FOLDER = Path(__file__).resolve().parent
LIBRARY_DIR = FOLDER / "lib"

KERNELS = "libascend_plugin_kernels.so"
LAUNCH = "libascend_plugin_launch.so"

#: Where CANN is, by its own ``set_env.sh``.
_CANN_VARIABLES = ("ASCEND_HOME_PATH", "ASCEND_CANN_PACKAGE_PATH", "ASCEND_TOOLKIT_HOME")

#: Another chip than the machine's, such as Ascend910B1.
SOC_VARIABLE = "SOC_VERSION"


class CannBuildError(RuntimeError):
    """The kernels could not be built; the message says what to do."""


def find_cann() -> Path | None:
    """Return the folder of CANN, or None."""
    for name in _CANN_VARIABLES:
        folder = os.environ.get(name)
        if folder and Path(folder).is_dir():
            return Path(folder)
    return None


def chip(cann: Path) -> str:
    """Return the name of the machine's chip, as ``ascendc.cmake`` wants it.

    Raises:
        CannBuildError: the driver does not say.
    """
    told = os.environ.get(SOC_VARIABLE)
    if told:
        return told
    try:
        library = ctypes.CDLL(str(cann / "lib64" / "libascendcl.so"))
        library.aclrtGetSocName.restype = ctypes.c_char_p
        name = library.aclrtGetSocName()
    except (OSError, AttributeError) as error:
        raise CannBuildError(f"the chip is unknown ({error}); set {SOC_VARIABLE}.") from None
    if not name:
        raise CannBuildError(
            f"the driver does not name the chip; set {SOC_VARIABLE}, e.g. to Ascend910B1."
        )
    return str(name.decode())


def build(cann: Path, target: Path = LIBRARY_DIR) -> None:
    """Compile kernels and operators into ``target``.

    Args:
        cann: folder of CANN.
        target: gets :data:`KERNELS` and :data:`LAUNCH`.

    Raises:
        CannBuildError: something is missing, or a compiler failed.
    """
    if shutil.which("cmake") is None:
        raise CannBuildError("cmake is not installed (Debian: apt-get install cmake).")
    with tempfile.TemporaryDirectory(prefix="ascendc-") as scratch:
        options = {
            "ASCEND_CANN_PACKAGE_PATH": str(cann),
            "SOC_VERSION": chip(cann),
            "TORCH_PATH": str(_package("torch")),
            "TORCH_NPU_PATH": str(_package("torch_npu")),
            "CMAKE_INSTALL_PREFIX": str(Path(scratch, "installed")),
        }
        given = [f"-D{name}={value}" for name, value in options.items()]
        _run("cmake", "-S", str(FOLDER), "-B", scratch, *given)
        _run("cmake", "--build", scratch, "--parallel", "2")
        found = {name: sorted(Path(scratch).rglob(name)) for name in (KERNELS, LAUNCH)}
        for name, paths in found.items():
            if not paths:
                raise CannBuildError(f"the build made no {name}; please report its output.")
        target.mkdir(parents=True, exist_ok=True)
        for name, paths in found.items():
            # A process that has the old library loaded keeps it.
            shutil.copy2(paths[0], target / f"{name}.new")
            (target / f"{name}.new").replace(target / name)


def _package(name: str) -> Path:
    spec = importlib.util.find_spec(name)
    if spec is None or spec.origin is None:
        raise CannBuildError(f"{name} is not installed; run: make install DEVICE=npu.")
    return Path(spec.origin).resolve().parent


def _run(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        output = "\n".join((done.stdout + done.stderr).splitlines()[-40:])
        raise CannBuildError(f"{' '.join(command[:3])} … failed:\n{output}")


def main() -> int:
    """Build where CANN is found; the exit status says whether a build failed."""
    cann = find_cann()
    if cann is None:
        print(
            f"AscendC kernels: not built, CANN was not found ({_CANN_VARIABLES[0]} is not set: "
            "source its set_env.sh); int8 caches are then served with operators of torch_npu."
        )
        return 0
    try:
        build(cann)
    except CannBuildError as error:
        print(f"AscendC kernels: {error}", file=sys.stderr)
        return 1
    print(f"AscendC kernels: built with {cann} in {LIBRARY_DIR}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
