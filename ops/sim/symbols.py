"""What the wheel needs from CANN: read from its ELF files with ``readelf``."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from .errors import SimulatorBuildError

#: Libraries that are there on every machine with torch, and the wheel's own.
_NOT_CANN = re.compile(
    r"(libc|libm|libdl|librt|libpthread|libstdc\+\+|libgcc_s|ld-linux.*|libtorch.*|libc10"
    r"|libnpu_profiler|libtensorpipe|_torchair|_abi_compat.*)\.so"
)
#: Opened by name at run time, so no ELF file asks for them.
OPENED_AT_RUN_TIME = (
    "libopapi.so",
    "libnnopbase.so",
    "libruntime.so",
    "libascend_hal.so",
    "libhcomm.so",
)
_TOOLCHAIN_LIBRARIES = (
    "libc.so.6",
    "libm.so.6",
    "libstdc++.so.6",
    "libgcc_s.so.1",
    "ld-linux-x86-64.so.2",
)
_OPERATOR = re.compile(rb"(?<![A-Za-z0-9_])(acl(?:nn[A-Z]|Rfft|Stft)[A-Za-z0-9_]*)\0")
_PHASE_ONE = "GetWorkspaceSize"
_MAX_WORKSPACE = "GetMaxWorkspaceSize"


@dataclass(frozen=True, slots=True)
class Needs:
    """What stand-ins must provide.

    Attributes:
        libraries: names of the shared libraries, sorted.
        functions: undefined functions that no library of the machine has, sorted.
        objects: the same for data.
        operators: aclnn operators named in the wheel, sorted: those with a phase one and a phase
            two by the name of phase two, and the ``…GetMaxWorkspaceSize`` functions.
    """

    libraries: tuple[str, ...]
    functions: tuple[str, ...]
    objects: tuple[str, ...]
    operators: tuple[str, ...]


def phase_one(operator: str) -> str:
    """Return the symbol of the function that an operator's call begins with."""
    return operator if operator.endswith(_MAX_WORKSPACE) else operator + _PHASE_ONE


def read_needs(packages: Path, torch_libraries: Path) -> Needs:
    """Find what torch_npu needs from CANN.

    Args:
        packages: folder that holds ``torch_npu``.
        torch_libraries: folder of torch's own shared libraries.

    Returns:
        The needs.

    Raises:
        SimulatorBuildError: readelf or gcc is missing, or the wheel has no libraries.
    """
    files = _wheel_libraries(packages / "torch_npu")
    undefined: dict[str, str] = {}
    defined: set[str] = set()
    needed: set[str] = set(OPENED_AT_RUN_TIME)
    for file in files:
        needed |= set(re.findall(r"\(NEEDED\).*\[(.*?)\]", _output("readelf", "-d", str(file))))
        wanted, has = _symbols(file)
        undefined.update(wanted)
        defined |= has
    for file in [*torch_libraries.glob("*.so*"), *_toolchain_libraries()]:
        defined |= _symbols(file)[1]
    missing = {
        name: kind
        for name, kind in undefined.items()
        if name not in defined and not name.startswith(("Py", "_Py"))
    }
    return Needs(
        libraries=tuple(sorted(name for name in needed if not _NOT_CANN.match(name))),
        functions=tuple(sorted(name for name, kind in missing.items() if kind != "OBJECT")),
        objects=tuple(sorted(name for name, kind in missing.items() if kind == "OBJECT")),
        operators=_operators(files),
    )


def _wheel_libraries(package: Path) -> list[Path]:
    patterns = ("*.so", "lib/*.so", "dynamo/torchair/core/*.so")
    files = sorted(file for pattern in patterns for file in package.glob(pattern))
    if not any(file.name == "libtorch_npu.so" for file in files):
        raise SimulatorBuildError(
            f"{package} holds no lib/libtorch_npu.so; it must be an unpacked torch_npu wheel. "
            "Remove the cache folder (ascend-plugin sim status names it) and build again."
        )
    return files


def _operators(files: Iterable[Path]) -> tuple[str, ...]:
    names: set[str] = set()
    for file in files:
        names |= {match.decode() for match in _OPERATOR.findall(file.read_bytes())}
    return tuple(
        sorted(
            name for name in names if name + _PHASE_ONE in names or name.endswith(_MAX_WORKSPACE)
        )
    )


def _symbols(file: Path) -> tuple[dict[str, str], set[str]]:
    """Undefined strong symbols without a version (name to kind), and defined symbols."""
    undefined: dict[str, str] = {}
    defined: set[str] = set()
    for line in _output("readelf", "-W", "--dyn-syms", str(file)).splitlines():
        parts = line.split()
        if len(parts) < 8 or not parts[0].endswith(":"):
            continue
        kind, binding, section = parts[3], parts[4], parts[6]
        name, _, version = parts[7].partition("@")
        if section != "UND":
            defined.add(name)
        elif binding != "WEAK" and not version:
            undefined[name] = kind
    return undefined, defined


def _toolchain_libraries() -> list[Path]:
    found = [
        Path(_output("gcc", f"-print-file-name={name}").strip()) for name in _TOOLCHAIN_LIBRARIES
    ]
    return [path for path in found if path.exists()]


def _output(*command: str) -> str:
    if shutil.which(command[0]) is None:
        package = "binutils" if command[0] == "readelf" else "g++"
        raise SimulatorBuildError(
            f"{command[0]} is not installed; the simulated NPU is compiled on this machine. "
            f"Install it (Debian: apt-get install {package})."
        )
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise SimulatorBuildError(
            f"{' '.join(command)} failed (exit {done.returncode}): {done.stderr.strip()}"
        )
    return done.stdout
