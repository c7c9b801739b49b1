"""The cache folder of the simulator, and the build that fills it once."""

from __future__ import annotations

import fcntl
import hashlib
import os
import platform
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from . import standins, symbols, wheel
from .errors import SimulatorBuildError
from .options import OPTIONS_VARIABLE, SimulatorOptions

#: Build variable: another cache folder.
CACHE_VARIABLE = "ASCEND_PLUGIN_SIM_CACHE"
_KEEP_SECONDS = 24 * 3600
_GENERATOR = ("standins.py", "symbols.py")


@dataclass(frozen=True, slots=True)
class Simulator:
    """A built simulator.

    Attributes:
        version: of torch_npu.
        packages: folder that holds ``torch_npu``.
        libraries: folder of the stand-ins.
        installed: whether ``packages`` belongs to the environment already.
    """

    version: str
    packages: Path
    libraries: Path
    installed: bool

    def environment(
        self, options: SimulatorOptions, task_queue: int, base: Mapping[str, str]
    ) -> dict[str, str]:
        """Return the environment for a command that is to see simulated NPUs.

        Args:
            options: the simulated machine.
            task_queue: torch_npu's ``TASK_QUEUE_ENABLE``.
            base: environment to start from.
        """
        changed = dict(base)
        changed[OPTIONS_VARIABLE] = options.to_json()
        changed["TASK_QUEUE_ENABLE"] = str(task_queue)
        changed["LD_LIBRARY_PATH"] = _prepend(self.libraries, base.get("LD_LIBRARY_PATH"))
        if not self.installed:
            changed["PYTHONPATH"] = _prepend(self.packages, base.get("PYTHONPATH"))
        # Set where torch_npu is installed without CANN, so that `import torch` works.
        changed.pop("TORCH_DEVICE_BACKEND_AUTOLOAD", None)
        return changed


def _prepend(folder: Path, rest: str | None) -> str:
    parts = [part for part in (rest or "").split(os.pathsep) if part and part != str(folder)]
    return os.pathsep.join([str(folder), *parts])


def cache_folder() -> Path:
    """Return the folder that holds everything the simulator builds."""
    chosen = os.environ.get(CACHE_VARIABLE)
    if chosen:
        return Path(chosen).expanduser().absolute()
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base, "ascend-plugin", "sim")


def status(version: str) -> Simulator | None:
    """Return the simulator if it is built for these sources and this wheel, else None.

    Args:
        version: the torch_npu version of the tested set.

    Raises:
        SimulatorBuildError: another torch_npu is installed.
    """
    packages, installed = _packages(version)
    if not packages.is_dir():
        return None
    libraries = _library_folder(version, packages)
    if not (libraries / standins.CORE_LIBRARY).is_file():
        return None
    return Simulator(version, packages, libraries, installed)


def build(
    version: str,
    wheel_file: Path | None = None,
    force: bool = False,
    report: Callable[[str], None] = lambda line: None,
) -> Simulator:
    """Build what is missing; at once if nothing is.

    Args:
        version: the torch_npu version of the tested set.
        wheel_file: wheel to unpack if torch_npu is not installed; fetched with pip when None.
        force: build although it is built.
        report: gets a line for each step that takes long.

    Raises:
        SimulatorBuildError: this machine cannot build it; the message says what to do.
    """
    _check_machine()
    packages, installed = _packages(version)
    with build_lock():
        if not installed and (wheel_file is not None or not packages.is_dir()):
            wheel.unpack_wheel(version, packages, wheel_file, report)
        libraries = _library_folder(version, packages)
        if force or not (libraries / standins.CORE_LIBRARY).is_file():
            report("compiling the stand-ins for CANN's libraries")
            _build_into(libraries, packages)
            _drop_old(libraries.parent)
    return Simulator(version, packages, libraries, installed)


def _drop_old(current: Path) -> None:
    """Drop libraries of other sources, except young ones: processes may still start on those."""
    limit = time.time() - _KEEP_SECONDS
    for folder in current.parent.glob("*/lib"):
        if folder.parent != current and folder.stat().st_mtime < limit:
            shutil.rmtree(folder.parent, ignore_errors=True)


def _build_into(libraries: Path, packages: Path) -> None:
    needs = symbols.read_needs(packages, wheel.torch_library_folder())
    home = libraries.parent
    home.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=home.parent, prefix=".build-") as scratch:
        made = Path(scratch, "lib")
        standins.build_standins(needs, packages / "torch_npu" / "include", made)
        shutil.rmtree(made / "objects")
        # A process that has the old libraries loaded keeps them.
        shutil.rmtree(libraries, ignore_errors=True)
        home.mkdir(exist_ok=True)
        made.rename(libraries)


def _packages(version: str) -> tuple[Path, bool]:
    found = wheel.installed_packages()
    own = cache_folder() / f"wheel-{version}"
    # Below `ascend-plugin sim run` the unpacked copy is importable as well.
    if found is None or found == own.resolve():
        return own, False
    return found, True


def _library_folder(version: str, packages: Path) -> Path:
    digest = hashlib.sha256(wheel.record_of(packages, version))
    folder = Path(__file__).resolve().parent
    sources = [*sorted((folder / "csrc").glob("*")), *(folder / name for name in _GENERATOR)]
    for path in sources:
        digest.update(path.name.encode())
        digest.update(path.read_bytes())
    digest.update(str(wheel.torch_library_folder()).encode())
    return cache_folder() / f"{version}-{digest.hexdigest()[:16]}" / "lib"


def _check_machine() -> None:
    machine = platform.machine().lower()
    if sys.platform != "linux" or machine not in ("x86_64", "amd64"):
        raise SimulatorBuildError(
            f"the simulated NPU runs on Linux x86_64 only, not on {sys.platform} {machine}; "
            "use such a machine, or real hardware."
        )


@contextmanager
def build_lock() -> Iterator[None]:
    """Let one process at a time build in the cache folder."""
    folder = cache_folder()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        handle = (folder / "lock").open("w")
    except OSError as error:
        raise SimulatorBuildError(
            f"the cache folder {folder} cannot be written ({error}); set {CACHE_VARIABLE} to a "
            "folder that can."
        ) from None
    with handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
