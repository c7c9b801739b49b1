"""The sdist, the wheel built from it, and the plugin that the wheel installs."""

from __future__ import annotations

import os
import sys
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

from ascend_plugin.ops.native import loader

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]

LOAD_LIBRARIES = """
import ascend_plugin.ops
from ascend_plugin.ops.native import build, loader
built = [row.name for row in loader.status() if row.built]
assert built == build.buildable_isas(), loader.status()
print("loaded", loader.load().path)
"""

ENTRY_POINTS = """
from importlib.metadata import distribution
import ascend_plugin, sys
points = {(p.group, p.name): p for p in distribution("ascend-plugin").entry_points}
platform = points["vllm.platform_plugins", "ascend"].load()
general = points["vllm.general_plugins", "ascend_general"].load()
assert platform is ascend_plugin.register_platform and general is ascend_plugin.register_general
assert callable(points["console_scripts", "ascend-plugin"].load())
assert len(points) == 3
print(ascend_plugin.__file__, platform())
"""


def wheel_names(built: Path) -> set[str]:
    with zipfile.ZipFile(next(built.glob("*.whl"))) as wheel:
        return set(wheel.namelist())


def package_files(tree: Path, *suffixes: str) -> set[str]:
    """Files below ascend_plugin/, reached through its symlinks."""
    found = set()
    for folder, _, files in os.walk(tree / "ascend_plugin", followlinks=True):
        found |= {os.path.relpath(Path(folder, file), tree) for file in files}
    return {name for name in found if name.endswith(suffixes)}


def test_wheel_tag_is_the_platform_only(built):
    name = next(built.glob("*.whl")).name
    assert name.startswith("ascend_plugin-0.1.0-py3-none-linux_"), name


def test_wheel_holds_every_source(built, tree):
    names = wheel_names(built)
    wanted = package_files(tree, ".py", ".toml", ".yaml", ".json", ".h", ".cpp")
    assert any(name.startswith("ascend_plugin/ops/csrc/") for name in wanted)
    assert any(name.startswith("ascend_plugin/ops/sim/csrc/") for name in wanted)
    assert any(name.startswith("ascend_plugin/configs/") for name in wanted)
    assert "ascend_plugin/tested_versions.toml" in wanted
    # A folder of the package without __init__.py would show here.
    assert wanted - names == set()


def test_wheel_holds_nothing_else(built):
    names = wheel_names(built)
    tops = {name.split("/")[0] for name in names}
    assert tops == {"ascend_plugin", "ascend_plugin-0.1.0.dist-info"}
    assert not [name for name in names if "__pycache__" in name or "/tests/" in name]
    libraries = {name for name in names if name.endswith(".so")}
    assert libraries
    assert all(name.startswith("ascend_plugin/ops/native/lib/libascend_cpu_") for name in libraries)
    assert not [name for name in libraries if "stale" in name]


def test_sdist_names_no_path_of_this_machine(built, tree, repository):
    private = {str(tree), str(repository), str(Path.home()), sys.prefix}
    for name in ("PIP_FIND_LINKS", "PIP_INDEX_URL", "PIP_EXTRA_INDEX_URL"):
        private |= set(os.environ.get(name, "").split())
    with tarfile.open(next(built.glob("*.tar.gz"))) as sdist:
        members = [member for member in sdist.getmembers() if member.isfile()]
        assert not [member.name for member in members if member.name.endswith(".so")]
        assert not [member.name for member in members if "__pycache__" in member.name]
        for member in members:
            reader = sdist.extractfile(member)
            assert reader is not None
            content = reader.read()
            named = [path for path in private if path.encode() in content]
            assert not named, f"{member.name} names {named}"


def test_sdist_has_plain_files_and_no_second_ops(built):
    with tarfile.open(next(built.glob("*.tar.gz"))) as sdist:
        members = sdist.getmembers()
    assert not [member.name for member in members if member.issym() or member.islnk()]
    assert not [member.name for member in members if member.name.split("/")[1:2] == ["ops"]]


def test_entry_points_resolve(installed, run, tmp_path):
    out = run([installed / "bin" / "python", "-c", ENTRY_POINTS], tmp_path).stdout
    # The wheel's package answers, not the checkout.
    assert str(installed) in out
    assert "ascend_plugin.platform." in out


def test_native_libraries_load(installed, run, tmp_path):
    out = run([installed / "bin" / "python", "-c", LOAD_LIBRARIES], tmp_path).stdout
    assert f"loaded {installed}" in out


def test_console_script(installed, run, tmp_path):
    out = run([installed / "bin" / "ascend-plugin", "--help"], tmp_path).stdout
    assert "model" in out
    assert "doctor" in out


def test_bare_ops_is_refused(installed, run, tree):
    done = run([installed / "bin" / "python", "-c", "import ops"], tree, check=False)
    assert done.returncode != 0
    assert "import this package as 'ascend_plugin.ops'" in done.stdout


def test_editable_install_is_the_checkout(
    tree: Path, make_environment: Callable[..., Path], run, tmp_path
):
    # Without the kernels, which take long; make install has built them in place.
    environment = make_environment("--editable", tree, ASCEND_PLUGIN_NATIVE="0")
    where = "import ascend_plugin.ops as ops; print(ops.__file__)"
    out = run([environment / "bin" / "python", "-c", where], tmp_path).stdout
    assert str(tree) in out
    assert loader.load().path.is_file()
