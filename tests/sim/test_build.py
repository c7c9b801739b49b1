"""Building: what is generated, and what is said where it cannot be built."""

from __future__ import annotations

import os
import platform
import subprocess
import zipfile
from pathlib import Path

import pytest

from ascend_plugin import versions
from ascend_plugin.ops.sim import SimulatorBuildError, home, standins, symbols, wheel
from ascend_plugin.ops.sim.symbols import Needs

VERSION = versions.tested_versions()["torch-npu"]


@pytest.fixture(scope="module")
def needs() -> Needs:
    built = home.status(VERSION)
    assert built is not None
    return symbols.read_needs(built.packages, wheel.torch_library_folder())


def test_needs_name_libraries_functions_and_operators(needs):
    assert {"libascendcl.so", "libhccl.so", "libopapi.so", "libge_runner.so"} <= set(
        needs.libraries
    )
    assert "aclrtMalloc" in needs.functions
    assert "aclnnAdd" in needs.operators
    assert any(name.endswith("GetMaxWorkspaceSize") for name in needs.operators)
    assert not any(name.startswith(("Py", "_ZN2at", "_ZN3c10")) for name in needs.functions)


def test_every_needed_symbol_is_in_the_stand_in(needs):
    built = home.status(VERSION)
    assert built is not None
    done = subprocess.run(
        ["nm", "-D", "--defined-only", built.libraries / standins.CORE_LIBRARY],
        capture_output=True,
        text=True,
        check=True,
    )
    defined = {line.split()[-1] for line in done.stdout.splitlines()}
    operators = {symbols.phase_one(name) for name in needs.operators}
    assert {*needs.functions, *needs.objects, *operators} <= defined
    assert {*needs.libraries} == {file.name for file in built.libraries.glob("*.so")}


def test_what_the_runtime_defines_gets_no_failing_stub():
    needs = Needs((), ("aclrtMalloc", "acltdtMadeUp", "_ZN2ge5GraphC1Ev"), (), ())
    text = standins.unsimulated_source(needs, {"aclrtMalloc"})
    assert "aclrtMalloc" not in text
    assert 'sim_unsimulated("acltdtMadeUp")' in text
    assert 'sim_unsimulated_abort("_ZN2ge5GraphC1Ev")' in text


def test_a_second_build_is_instant(monkeypatch):
    monkeypatch.setattr(standins, "build_standins", pytest.fail)
    assert home.build(VERSION) == home.status(VERSION)


@pytest.fixture
def other_cache(monkeypatch, tmp_path) -> Path:
    """A cache with the wheel, but without stand-ins."""
    built = home.status(VERSION)
    assert built is not None
    if not built.installed:
        (tmp_path / built.packages.name).symlink_to(built.packages)
    monkeypatch.setenv(home.CACHE_VARIABLE, str(tmp_path))
    monkeypatch.setattr(wheel, "installed_packages", lambda: None)
    return tmp_path


@pytest.mark.parametrize("tool, remedy", [("readelf", "binutils"), ("g++", "apt-get install g++")])
def test_a_missing_tool_is_named(monkeypatch, tmp_path, other_cache, tool, remedy):
    monkeypatch.delenv("CXX", raising=False)
    for name in {"readelf", "gcc", "g++", "nm"} - {tool}:
        real = next(Path(p, name) for p in os.defpath.split(":") if Path(p, name).exists())
        (tmp_path / "bin").mkdir(exist_ok=True)
        (tmp_path / "bin" / name).symlink_to(real)
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    with pytest.raises(SimulatorBuildError, match=f"{tool.replace('+', '[+]')}.*not installed"):
        home.build(VERSION)
    with pytest.raises(SimulatorBuildError, match=remedy.replace("+", "[+]")):
        home.build(VERSION)


def test_a_compiler_error_shows_the_command(monkeypatch, tmp_path, other_cache):
    broken = tmp_path / "csrc"
    broken.mkdir()
    (broken / "broken.cpp").write_text("this is no C++\n")
    monkeypatch.setattr(standins, "SOURCE_DIR", broken)
    with pytest.raises(SimulatorBuildError, match=r"g\+\+ 12 is tested\n\$ g\+\+ "):
        home.build(VERSION)
    assert not list(tmp_path.glob(".build-*")), "a failed build leaves nothing"
    assert home.status(VERSION) is None


def test_another_machine_is_named(monkeypatch):
    monkeypatch.setattr(platform, "machine", lambda: "aarch64")
    with pytest.raises(SimulatorBuildError, match="x86_64 only, not on linux aarch64"):
        home.build(VERSION)


def test_another_version_of_torch_npu_is_named(monkeypatch, tmp_path):
    (tmp_path / "torch_npu-2.9.0.dist-info").mkdir()
    (tmp_path / "torch_npu-2.9.0.dist-info" / "RECORD").write_text("")
    monkeypatch.setattr(wheel, "installed_packages", lambda: tmp_path)
    with pytest.raises(SimulatorBuildError, match=f"torch_npu is 2.9.0 .* tested with {VERSION}"):
        home.build(VERSION)


def test_a_wheel_that_cannot_be_fetched_is_named(monkeypatch, tmp_path):
    monkeypatch.setenv(home.CACHE_VARIABLE, str(tmp_path))
    monkeypatch.setattr(wheel, "installed_packages", lambda: None)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    with pytest.raises(SimulatorBuildError, match="ascend-plugin sim build --wheel FILE"):
        home.build(VERSION)


def test_a_broken_wheel_is_named(monkeypatch, tmp_path):
    monkeypatch.setenv(home.CACHE_VARIABLE, str(tmp_path))
    monkeypatch.setattr(wheel, "installed_packages", lambda: None)
    broken = tmp_path / "torch_npu.whl"
    broken.write_text("no zip")
    with pytest.raises(SimulatorBuildError, match="cannot be unpacked"):
        home.build(VERSION, broken)
    with zipfile.ZipFile(broken, "w") as archive:
        archive.writestr("torch_npu-1.0.dist-info/RECORD", "")
    with pytest.raises(SimulatorBuildError, match=r"torch_npu is 1\.0"):
        home.build(VERSION, broken)
    assert not (tmp_path / f"wheel-{VERSION}").exists()


def test_a_cache_that_cannot_be_written_is_named(monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv(home.CACHE_VARIABLE, str(tmp_path / "file" / "below"))
    with pytest.raises(SimulatorBuildError, match="ASCEND_PLUGIN_SIM_CACHE"):
        home.build(VERSION)
