"""Where torch_npu is: installed in the environment, or unpacked in the simulator's cache."""

from __future__ import annotations

import importlib.util
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path

from .errors import SimulatorBuildError


def installed_packages() -> Path | None:
    """Return the folder that holds an importable ``torch_npu``; None if there is none."""
    spec = importlib.util.find_spec("torch_npu")
    if spec is None or spec.origin is None:
        return None
    return Path(spec.origin).resolve().parent.parent


def torch_library_folder() -> Path:
    """Return the folder of torch's shared libraries, without importing torch.

    Raises:
        SimulatorBuildError: torch is not installed.
    """
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        raise SimulatorBuildError(
            "torch is not installed, and torch_npu needs it; in a checkout run: make install."
        )
    return Path(spec.origin).resolve().parent / "lib"


def record_of(packages: Path, version: str) -> bytes:
    """Return the wheel's RECORD, which holds the hash of each of its files.

    Args:
        packages: folder with the wheel's files.
        version: the torch_npu version that is wanted.

    Raises:
        SimulatorBuildError: another version lies there.
    """
    found = sorted(packages.glob("torch_npu-*.dist-info/RECORD"))
    versions = [path.parent.name.removesuffix(".dist-info").split("-")[1] for path in found]
    matching = [path for path, name in zip(found, versions, strict=True)
                if name.partition("+")[0] == version]  # fmt: skip
    if not matching:
        raise SimulatorBuildError(
            f"torch_npu is {', '.join(versions) or 'of unknown version'} in {packages}; the "
            f"simulated NPU was tested with {version}. Install that one, or uninstall torch_npu: "
            "the simulator then fetches its own copy."
        )
    return matching[0].read_bytes()


def unpack_wheel(
    version: str, target: Path, wheel: Path | None, report: Callable[[str], None]
) -> None:
    """Put the files of the torch_npu wheel into ``target``; nothing is installed.

    Args:
        version: which torch_npu.
        target: folder to make; it appears only when it is complete.
        wheel: file to use; fetched with pip when None.
        report: gets a line about what takes long.

    Raises:
        SimulatorBuildError: the wheel cannot be had or is broken.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".wheel-") as scratch:
        if wheel is None:
            report(f"fetching the torch_npu {version} wheel (44 MB)")
            wheel = _fetch(version, Path(scratch))
        files = Path(scratch, "files")
        try:
            with zipfile.ZipFile(wheel) as archive:
                archive.extractall(files)
        except (OSError, zipfile.BadZipFile) as error:
            raise SimulatorBuildError(
                f"{wheel} cannot be unpacked ({error}); give the torch_npu {version} wheel for "
                "this Python and x86_64."
            ) from None
        record_of(files, version)
        shutil.rmtree(target, ignore_errors=True)
        files.rename(target)


def _fetch(version: str, folder: Path) -> Path:
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:"]
    command += ["--disable-pip-version-check", "--dest", str(folder), f"torch-npu=={version}"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    wheels = list(folder.glob("torch_npu-*.whl"))
    if done.returncode != 0 or not wheels:
        last = (done.stderr.strip().splitlines() or ["no wheel"])[-1]
        raise SimulatorBuildError(
            f"pip could not fetch torch-npu {version} ({last}). Without a network, fetch the wheel "
            "elsewhere and run: ascend-plugin sim build --wheel FILE."
        )
    return wheels[0]
