"""Builds the native CPU kernels into the package; everything else is in pyproject.toml.

The kernels have a plain C ABI and are loaded with ctypes, so a wheel fits every Python 3 of its
platform. ``ASCEND_PLUGIN_NATIVE=0`` leaves them out: a pure wheel that computes with the
reference operators.
"""

from __future__ import annotations

import os
import runpy
import shutil
from pathlib import Path
from typing import ClassVar

from setuptools import Command, Distribution, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build import build

ROOT = Path(__file__).resolve().parent
#: Inside the package, not ``ops/``: in an sdist the symlink has become a folder and there is no
#: top-level ``ops/``.
NATIVE = Path("ascend_plugin", "ops", "native")


def native_enabled() -> bool:
    """Whether this build compiles the native kernels."""
    return os.environ.get("ASCEND_PLUGIN_NATIVE", "1") != "0"


def compile_kernels(target: Path) -> None:
    """Compile one library per instruction set into ``target``, all of them or none.

    ``ops/native/build.py`` is run by path: importing the package would need torch.
    """
    builder = runpy.run_path(str(ROOT / NATIVE / "build.py"))
    try:
        builder["build"](target)
    except builder["NativeBuildError"] as error:
        raise SystemExit(
            f"ascend-plugin: {error}\n"
            "ascend-plugin: or set ASCEND_PLUGIN_NATIVE=0 to install without the native kernels "
            "(correct, but slow: every operator then runs as its reference)."
        ) from None


class BuildNative(Command):
    """Sub-command of ``build``, following ``setuptools.command.build.SubCommand``."""

    description = "compile the native CPU kernels"
    user_options: ClassVar = [("build-lib=", "d", "folder to build into")]
    editable_mode = False
    build_lib: str | None

    def initialize_options(self) -> None:
        """Declare the options."""
        self.build_lib = None

    def finalize_options(self) -> None:
        """Take the folder from ``build_py``, like the package's Python files."""
        self.set_undefined_options("build_py", ("build_lib", "build_lib"))

    def _target(self) -> Path:
        base = ROOT if self.editable_mode else Path(str(self.build_lib))
        return base / NATIVE / "lib"

    def run(self) -> None:
        """Compile into the build folder, or into the checkout of an editable install."""
        compile_kernels(self._target())

    def get_source_files(self) -> list[str]:
        """Nothing to add: MANIFEST.in grafts the sources."""
        return []

    def get_outputs(self) -> list[str]:
        """The libraries built so far."""
        return [str(path) for path in sorted(self._target().glob("*.so"))]

    def get_output_mapping(self) -> dict[str, str]:
        """Nothing is linked: an editable install compiles in place."""
        return {}


class Build(build):
    """``build`` with the native kernels, from an empty folder."""

    sub_commands: ClassVar = [*build.sub_commands, ("build_native", lambda _: native_enabled())]

    def run(self) -> None:
        """Drop what an earlier build left: it would end up in the wheel."""
        shutil.rmtree(self.build_lib, ignore_errors=True)
        super().run()


class BdistWheel(bdist_wheel):
    """Tag the wheel by platform only: ctypes does not care about the Python ABI."""

    def get_tag(self) -> tuple[str, str, str]:
        """Return the tag, ``py3-none-<platform>`` with native kernels."""
        python, abi, platform = super().get_tag()
        return ("py3", "none", platform) if native_enabled() else (python, abi, platform)


class NativeDistribution(Distribution):
    """A distribution that is platform specific although it has no Python extension."""

    def has_ext_modules(self) -> bool:
        """Whether the wheel depends on the platform."""
        return native_enabled()


setup(
    distclass=NativeDistribution,
    cmdclass={"build": Build, "bdist_wheel": BdistWheel, "build_native": BuildNative},
)
