"""Finding, building and loading kernels: with a stand-in for CANN's compiler, and without any."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from ascend_plugin.ops.ascendc import cann, library

#: Poses as ``ascendc.cmake`` of CANN: looks at the kernels, and compiles functions without bodies.
FAKE_CMAKE = """
function(ascendc_library name type)
  set(source ${CMAKE_BINARY_DIR}/launches.cpp)
  set(entry aclrtlaunch_kv_cache_write_none_bf16)
  file(WRITE ${source} "extern \\"C\\" unsigned ${entry}() { return 7; }")
  foreach(kernel ${ARGN})
    if(NOT EXISTS ${kernel})
      message(FATAL_ERROR "${kernel} does not exist")
    endif()
    message(STATUS "kernel ${kernel} for ${SOC_VERSION}")
  endforeach()
  add_library(${name} ${type} ${source})
endfunction()
function(ascendc_include_directories)
endfunction()
"""

#: Loads what was built as a machine with an NPU would.
LOAD = """
import sys
from pathlib import Path
from ascend_plugin.ops.ascendc import cann, library
cann.LIBRARY_DIR = Path(sys.argv[1])
found = library._load_built()
print("ENTRIES", sorted(found.entries), "MISSING", sorted(found.missing))
"""


@pytest.fixture
def fake_cann(tmp_path: Path) -> Path:
    folder = tmp_path / "cann" / "tools" / "tikcpp" / "ascendc_kernel_cmake"
    folder.mkdir(parents=True)
    (folder / "ascendc.cmake").write_text(FAKE_CMAKE)
    return tmp_path / "cann"


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("cmake") is None, reason="cmake is not installed")
def test_what_cmake_builds_is_found_and_loaded(
    fake_cann: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(cann.SOC_VARIABLE, "Ascend910B1")
    target = tmp_path / "lib"
    cann.build(fake_cann, target)
    assert {path.name for path in target.iterdir()} == {cann.KERNELS, cann.LAUNCH}
    done = subprocess.run(
        [sys.executable, "-c", LOAD, str(target)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    # The other entries of that kernel are missing, and so are the other kernels.
    assert f"['kv_cache_write_none_bf16'] MISSING {sorted(library.ENTRIES)}" in done.stdout


def test_a_failing_compiler_is_quoted(
    fake_cann: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if shutil.which("cmake") is None:
        pytest.skip("cmake is not installed")
    monkeypatch.setenv(cann.SOC_VARIABLE, "Ascend910B1")
    (fake_cann / "tools/tikcpp/ascendc_kernel_cmake/ascendc.cmake").write_text(
        'message(FATAL_ERROR "the licence of ccec has expired")'
    )
    with pytest.raises(cann.CannBuildError, match="the licence of ccec has expired"):
        cann.build(fake_cann, tmp_path / "lib")


def test_a_missing_ascendc_cmake_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if shutil.which("cmake") is None:
        pytest.skip("cmake is not installed")
    monkeypatch.setenv(cann.SOC_VARIABLE, "Ascend910B1")
    with pytest.raises(cann.CannBuildError, match="ASCENDC_CMAKE_DIR"):
        cann.build(tmp_path, tmp_path / "lib")


def test_without_cann_one_line_says_so(monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    for name in ("ASCEND_HOME_PATH", "ASCEND_CANN_PACKAGE_PATH", "ASCEND_TOOLKIT_HOME"):
        monkeypatch.delenv(name, raising=False)
    assert cann.main() == 0
    (line,) = capsys.readouterr().out.splitlines()
    assert "not built, CANN was not found" in line


def test_an_unknown_chip_names_the_variable(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(cann.SOC_VARIABLE, raising=False)
    with pytest.raises(cann.CannBuildError, match=rf"set {cann.SOC_VARIABLE}\."):
        cann.chip(tmp_path)


def test_kernels_that_are_not_built_have_a_remedy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(library, "simulated", lambda: False)
    monkeypatch.setattr(cann, "LIBRARY_DIR", tmp_path)
    assert "make install DEVICE=npu" in library.why_missing()
    monkeypatch.setenv(library.SWITCH, "0")
    assert "unset it" in library.why_missing()


def test_the_switch_leaves_all_kernels_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(library.SWITCH, "0")
    found = library.load.__wrapped__()
    assert not found.entries
    assert set(found.missing) == set(library.ENTRIES)


def test_an_unknown_entry_is_no_kernel() -> None:
    assert library.support("kv_cache_write_c8x_bf16").reason.startswith(
        "there is no AscendC kernel"
    )
