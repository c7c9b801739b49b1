"""Compiles ``ops/csrc`` into one shared library per instruction set.

``setup.py`` imports this file by path before anything is installed, so it needs only the standard
library and no import from this package.
"""

from __future__ import annotations

import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

SOURCE_DIR = Path(__file__).resolve().parent.parent / "csrc"
LIBRARY_DIR = Path(__file__).resolve().parent / "lib"

#: Instruction sets, best first, and the compiler flags of each.
ISA_FLAGS: dict[str, tuple[str, ...]] = {
    "avx512": ("-march=x86-64-v4", "-mavx512vnni", "-mavx512bf16", "-mavx512vbmi"),
    "avx2": ("-mavx2", "-mfma", "-mf16c"),
    "portable": (),
}
#: Never -ffast-math: linked by gcc before 13 it turns subnormals off for the whole process.
COMMON_FLAGS = (
    "-std=c++17",
    "-O3",
    "-shared",
    "-fPIC",
    "-fopenmp",
    "-fvisibility=hidden",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-ffp-contract=fast",
)
_X86_MACHINES = {"x86_64", "amd64", "i686", "i386"}


class NativeBuildError(RuntimeError):
    """The native kernels could not be compiled; the message says what to do."""


def source_hash() -> str:
    """Hash of what the libraries are compiled from: sources and flags.

    The libraries carry it, so that kernels of other sources than the package's are never used: they
    may disagree with the reference although their ABI is the same.
    """
    digest = hashlib.sha256(repr((ISA_FLAGS, COMMON_FLAGS)).encode())
    for path in sorted((*SOURCE_DIR.glob("*.cpp"), *SOURCE_DIR.glob("*.h"))):
        digest.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()[:16]


def buildable_isas() -> list[str]:
    """Instruction sets that this machine's compiler can target, best first."""
    if platform.machine().lower() in _X86_MACHINES:
        return list(ISA_FLAGS)
    return ["portable"]


def library_path(isa: str, directory: Path = LIBRARY_DIR) -> Path:
    """Where the library of one instruction set lies."""
    return directory / f"libascend_cpu_{isa}.so"


def find_compiler() -> list[str]:
    """The C++ compiler as an argument list: ``$CXX``, else g++, else c++.

    Raises:
        NativeBuildError: there is none.
    """
    configured = os.environ.get("CXX", "").strip()
    if configured:
        command = shlex.split(configured)
        if shutil.which(command[0]) is None:
            raise NativeBuildError(
                f"CXX={configured!r} names a compiler that is not on PATH; set CXX to g++ or "
                "clang++, or unset it"
            )
        return command
    for name in ("g++", "c++"):
        if shutil.which(name) is not None:
            return [name]
    raise NativeBuildError(
        "no C++ compiler found (tried $CXX, g++, c++); install g++: apt-get install g++"
    )


def _check_isas(isas: Sequence[str]) -> list[str]:
    unknown = [isa for isa in isas if isa not in ISA_FLAGS]
    if unknown:
        raise NativeBuildError(
            f"unknown instruction set {unknown[0]!r}; choose from {', '.join(ISA_FLAGS)}"
        )
    possible = buildable_isas()
    return [isa for isa in isas if isa in possible]


def _compile(compiler: Sequence[str], isa: str, sources: Sequence[Path], target: Path) -> None:
    command = [
        *compiler,
        *COMMON_FLAGS,
        *ISA_FLAGS[isa],
        f'-DASCEND_CPU_SOURCES="{source_hash()}"',
        *(str(source) for source in sources),
        "-o",
        str(target),
    ]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode != 0:
        raise NativeBuildError(
            f"compiling the {isa} kernels failed (exit {result.returncode}); g++ 12 or clang 14 "
            f"with OpenMP is needed\n$ {shlex.join(command)}\n{result.stderr.strip()}"
        )


def build(output_dir: Path, isas: Sequence[str] | None = None) -> list[Path]:
    """Compiles the kernels, all instruction sets at once.

    All libraries are compiled aside first and then renamed into place, so a failure leaves what was
    there before, and a process that has an old library loaded keeps it.

    Args:
        output_dir: folder of the libraries; created when missing.
        isas: instruction sets to build; all that suit this machine when None. x86 sets are skipped
            on other machines.

    Returns:
        Paths of the libraries built, in the order of ``isas``.

    Raises:
        NativeBuildError: no compiler, an unknown instruction set, or a compiler error.
    """
    chosen = _check_isas(buildable_isas() if isas is None else isas)
    compiler = find_compiler()
    sources = sorted(SOURCE_DIR.glob("*.cpp"))
    if not sources:
        raise NativeBuildError(f"no sources in {SOURCE_DIR}; the package is incomplete: reinstall")
    output_dir.mkdir(parents=True, exist_ok=True)
    targets = [library_path(isa, output_dir) for isa in chosen]
    with tempfile.TemporaryDirectory(dir=output_dir, prefix=".build-") as scratch:
        made = [Path(scratch) / target.name for target in targets]
        with ThreadPoolExecutor(max_workers=max(1, len(chosen))) as pool:
            jobs = [
                pool.submit(_compile, compiler, isa, sources, path)
                for isa, path in zip(chosen, made, strict=True)
            ]
            for job in jobs:
                job.result()
        for path, target in zip(made, targets, strict=True):
            path.replace(target)
    return targets
