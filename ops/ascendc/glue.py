"""Compiles the operators that launch kernels (``launch/launch.cpp``) against torch_npu's headers.

This is for the simulated NPU; with CANN ``CMakeLists.txt`` compiles the same file. Nothing here
imports torch, so that ``ascend-plugin sim build`` needs no device.
"""

from __future__ import annotations

import hashlib
import os
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

from ..sim import wheel
from ..sim.errors import SimulatorBuildError
from ..sim.home import build_lock, cache_folder

_FOLDER = Path(__file__).resolve().parent
SOURCE = _FOLDER / "launch" / "launch.cpp"
#: The part of the kernels that it shares: how attention is divided, and the workspace for that.
TILING = _FOLDER / "kernels" / "attention_tiling.h"
LIBRARY = "libascend_plugin_launch.so"

_FLAGS = ("-std=c++20", "-O1", "-fPIC", "-shared", "-w")
_INCLUDES = ("", "third_party/acl/inc", "third_party/hccl/inc")


def build(
    packages: Path, report: Callable[[str], None] = lambda line: None, force: bool = False
) -> Path:
    """Return the library of the operators, compiled first if it is not there.

    Args:
        packages: folder that holds ``torch_npu``.
        report: gets a line before the compiler runs, which takes some ten seconds.
        force: compile although it is there.

    Raises:
        SimulatorBuildError: no compiler, or it failed.
    """
    target = _target(packages)
    if target.is_file() and not force:
        return target
    with build_lock():
        if not target.is_file() or force:
            report("compiling the operators that launch AscendC kernels")
            _compile(packages, target)
    return target


def _target(packages: Path) -> Path:
    digest = hashlib.sha256(repr(_FLAGS).encode() + SOURCE.read_bytes() + TILING.read_bytes())
    for record in sorted(packages.glob("torch_npu-*.dist-info/RECORD")):
        digest.update(record.read_bytes())
    torch = wheel.torch_library_folder()
    digest.update(str(torch).encode() + str((torch / "libtorch.so").stat().st_mtime).encode())
    return cache_folder() / f"launch-{digest.hexdigest()[:16]}" / LIBRARY


def _compile(packages: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
        made = Path(scratch, LIBRARY)
        command = [*_compiler(), *_FLAGS, str(SOURCE), *_options(packages), "-o", str(made)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            raise SimulatorBuildError(
                f"compiling {SOURCE} failed (exit {done.returncode}); g++ 12 is tested\n"
                f"$ {shlex.join(command)}\n{done.stderr.strip()}"
            )
        made.replace(target)


def _options(packages: Path) -> Iterator[str]:
    libraries = wheel.torch_library_folder()
    include = libraries.parent / "include"
    yield f"-I{TILING.parent}"
    yield from (f"-I{include}", f"-I{include / 'torch' / 'csrc' / 'api' / 'include'}")
    yield from (f"-I{packages / 'torch_npu' / 'include' / name}" for name in _INCLUDES)
    yield from (f"-L{libraries}", "-ltorch", "-ltorch_cpu", "-lc10")
    yield from (f"-L{packages / 'torch_npu' / 'lib'}", "-ltorch_npu")


def _compiler() -> list[str]:
    configured = shlex.split(os.environ.get("CXX", "")) or ["g++"]
    if shutil.which(configured[0]) is None:
        raise SimulatorBuildError(
            f"the C++ compiler {configured[0]!r} is not installed; launches of AscendC kernels are "
            "compiled on this machine. Install g++ (Debian: apt-get install g++) or set CXX."
        )
    return configured
