"""What the build does without a compiler, and when told to leave the kernels out."""

from __future__ import annotations

import shutil
import sys
import zipfile
from pathlib import Path

import pytest

pytestmark = [pytest.mark.slow, pytest.mark.timeout(120)]


@pytest.fixture
def clean_tree(tree, tmp_path):
    copy = tmp_path / "clean"
    shutil.copytree(tree, copy, symlinks=True, ignore=shutil.ignore_patterns("*.so", "build"))
    return copy


def build_wheel(run, tree: Path, out: Path, **env: str):
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation"]
    return run([*command, "--wheel-dir", out, tree], out, check=False, **env)


def test_missing_compiler_is_a_sentence_and_leaves_nothing(clean_tree, run, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    done = build_wheel(run, clean_tree, out, CXX="/nonexistent/c++")
    assert done.returncode != 0
    assert "/nonexistent/c++" in done.stdout
    assert "compiler" in done.stdout
    assert "ASCEND_PLUGIN_NATIVE=0" in done.stdout
    assert "Traceback" not in done.stdout
    assert not [*out.iterdir(), *clean_tree.rglob("*.so")]


def test_native_off_makes_a_pure_wheel(clean_tree, run, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    # With no compiler either: it must not be asked for.
    done = build_wheel(run, clean_tree, out, ASCEND_PLUGIN_NATIVE="0", CXX="/nonexistent/c++")
    assert done.returncode == 0, done.stdout
    (wheel,) = out.glob("*.whl")
    assert wheel.name == "ascend_plugin-0.1.0-py3-none-any.whl"
    with zipfile.ZipFile(wheel) as archive:
        assert not [name for name in archive.namelist() if name.endswith(".so")]


def test_a_second_build_drops_what_the_first_left(clean_tree, run, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    module = clean_tree / "ascend_plugin" / "gone.py"
    module.write_text('"""Removed before the second build."""\n')
    build_wheel(run, clean_tree, out, ASCEND_PLUGIN_NATIVE="0")
    module.unlink()
    build_wheel(run, clean_tree, out, ASCEND_PLUGIN_NATIVE="0")
    (wheel,) = out.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        assert "ascend_plugin/gone.py" not in archive.namelist()
