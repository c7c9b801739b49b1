"""A kernel library is used only by the package whose sources it was compiled from."""

from __future__ import annotations

import shutil

import pytest

from ascend_plugin.ops.native import build, loader


@pytest.fixture
def portable(tmp_path, monkeypatch):
    """A folder with a copy of this machine's portable library, which the loader looks into."""
    shutil.copy(build.library_path("portable"), tmp_path)
    monkeypatch.setattr(build, "library_path", lambda isa: tmp_path / f"libascend_cpu_{isa}.so")
    return tmp_path


def test_a_library_of_these_sources_loads(portable):
    assert loader._open("portable").path.parent == portable


def test_a_library_of_other_sources_is_refused(portable, tmp_path, monkeypatch):
    changed = tmp_path / "csrc"
    shutil.copytree(build.SOURCE_DIR, changed)
    with (changed / "simd.h").open("a") as header:
        header.write("// one comment more\n")
    monkeypatch.setattr(build, "SOURCE_DIR", changed)
    monkeypatch.setattr(loader, "_source_hash", build.source_hash)
    with pytest.raises(loader.NativeLibraryError, match=r"other sources than .*csrc; rebuild it"):
        loader._open("portable")
