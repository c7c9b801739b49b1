"""Building kernels against the host model, launching them, and what a launch reports."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from ascend_plugin.ops.ascendc import build, host
from ascend_plugin.ops.native.build import find_compiler

KERNELS = Path(__file__).parent / "kernels"
TILE = 64


def scale(tiles: int = 9, cores: int = 4, schedule: host.Schedule | None = None) -> host.Report:
    x = torch.randn(tiles * TILE)
    out = torch.zeros_like(x)
    kernel = host.library("scale_rows", KERNELS)
    report = kernel.launch("scale_rows", cores, [x, out, tiles, 2.5],
                           schedule=schedule or host.Schedule())  # fmt: skip
    assert torch.equal(out, x * 2.5)
    return report


@pytest.mark.parametrize(("tiles", "cores"), [(0, 1), (1, 4), (9, 4), (40, 48)])
def test_any_number_of_cores(tiles: int, cores: int) -> None:
    for schedule in host.schedules(8):
        scale(tiles, cores, schedule)


def test_report_counts_instructions_and_bytes() -> None:
    report = scale(tiles=9)
    moved = 9 * TILE * 4
    assert report.aic == {}
    assert report.aiv["MTE2"].instructions == report.aiv["V"].instructions == 9
    assert report.aiv["MTE2"].bytes == 2 * moved  # read from GM, written to UB
    assert report.traffic["x"] == host.Traffic(read=moved, written=0)
    assert report.traffic["out"] == host.Traffic(read=0, written=moved)
    assert (report.read, report.written) == (moved, moved)
    assert (report.bound, report.busiest) == ("memory", "AIV MTE2")


def test_the_estimate_does_not_depend_on_the_schedule() -> None:
    assert len({scale(schedule=schedule).cycles for schedule in host.schedules(12)}) == 1


def test_the_estimate_falls_with_cores_and_grows_with_work() -> None:
    assert scale(tiles=40, cores=1).cycles > scale(tiles=40, cores=8).cycles
    assert scale(tiles=40, cores=1).cycles > scale(tiles=10, cores=1).cycles


def test_schedules_begin_eager_and_laziest(monkeypatch: pytest.MonkeyPatch) -> None:
    assert host.schedules(3) == [host.Schedule(0), host.Schedule(1), host.Schedule(2)]
    monkeypatch.setenv(host.SCHEDULES_VARIABLE, "5")
    assert len(host.schedules()) == 5


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ([None, None, 0], ValueError, r"takes 4 arguments \(x, out, tiles, factor\); 3 given"),
        ([1, None, 0, 1.0], TypeError, "argument x is GM_ADDR: a tensor or None"),
        ([None, None, -1, 1.0], TypeError, "argument tiles is uint32_t, got -1"),
        ([None, None, None, 1.0], TypeError, "argument tiles is uint32_t, got NoneType"),
        ([torch.zeros(4, 4).T, None, 0, 1.0], ValueError, "argument x: a contiguous CPU tensor"),
    ],
)
def test_arguments_are_checked(arguments, error, message: str) -> None:
    with pytest.raises(error, match=message):
        host.library("scale_rows", KERNELS).launch("scale_rows", 1, arguments)


def test_unknown_entry_points_and_cores_are_refused() -> None:
    kernel = host.library("scale_rows", KERNELS)
    with pytest.raises(ValueError, match="no entry point 'scale'; there are: scale_rows"):
        kernel.launch("scale", 1, [])
    with pytest.raises(ValueError, match="block_dim 0"):
        kernel.launch("scale_rows", 0, [None, None, 0, 1.0])


def test_a_library_survives_an_error() -> None:
    kernel = host.library("scale_rows", KERNELS)
    x = torch.zeros(TILE)
    for schedule in host.schedules(6):
        with pytest.raises(host.KernelError, match="leave its 256 bytes"):
            kernel.launch("scale_rows", 4, [x, x.clone(), 2, 1.0], schedule=schedule)
        scale(schedule=schedule)


ENTRY = """
#include "own.h"
#define TWICE(NAME) \\
  extern "C" __global__ __aicore__ void NAME##_a(GM_ADDR x, const uint32_t n, float f) { \\
    KERNEL_TASK_TYPE_DEFAULT(KERNEL_TYPE_MIX_AIC_1_2); \\
  } \\
  extern "C" __global__ __aicore__ void NAME##_b(GM_ADDR x) {}
TWICE(first)
"""


def test_entry_points_come_out_of_macros(tmp_path: Path) -> None:
    (tmp_path / "own.h").write_text('#include "kernel_operator.h"\n')
    (tmp_path / "twice.cpp").write_text(ENTRY)
    with_type, without = build.entry_points(tmp_path / "twice.cpp")
    assert with_type == build.EntryPoint(
        "first_a", "MIX_AIC_1_2", (("GM_ADDR", "x"), ("uint32_t", "n"), ("float", "f"))
    )
    assert without == build.EntryPoint("first_b", "AIV_ONLY", (("GM_ADDR", "x"),))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("void f() {}", "has no entry point"),
        ('extern "C" __global__ __aicore__ void f(half x) {}', "argument 'half x'; the types"),
        (
            'extern "C" __global__ __aicore__ void f(GM_ADDR x) '
            "{ KERNEL_TASK_TYPE_DEFAULT(KERNEL_TYPE_MIX); }",
            r"KERNEL_TASK_TYPE_DEFAULT\(KERNEL_TYPE_MIX\); known are KERNEL_TYPE_AIV_ONLY",
        ),
    ],
)
def test_kernels_that_cannot_be_launched(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "bad.cpp").write_text(text)
    with pytest.raises(build.KernelBuildError, match=message):
        build.entry_points(tmp_path / "bad.cpp")


def test_missing_kernels_and_compilers_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(build.KernelBuildError, match=r"no kernel 'nothing' .*scale_rows"):
        build.library_path("nothing", KERNELS)
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(build.KernelBuildError, match="no-such-compiler"):
        build.library_path("scale_rows", KERNELS)


def test_libraries_are_keyed_by_their_sources(tmp_path: Path) -> None:
    source = tmp_path / "kernel.cpp"
    header = tmp_path / "own.h"
    (tmp_path / "other.h").write_text("// nobody includes this")
    source.write_text('#include "own.h"\n')
    header.write_text("// one")
    compiler = find_compiler()
    first = build._hash(source, compiler)
    assert build._hash(source, compiler) == first
    (tmp_path / "other.h").write_text("// still nobody")
    assert build._hash(source, compiler) == first
    header.write_text("// two")
    assert build._hash(source, compiler) != first


def test_folders_can_be_chosen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(build.KERNELS_VARIABLE, str(KERNELS))
    assert build.library_path("scale_rows") == build.library_path("scale_rows", KERNELS)
    monkeypatch.setenv(build.CACHE_VARIABLE, str(tmp_path))
    assert build.cache_folder() == tmp_path


#: Stands for the simulated NPU: runs a launch at once and keeps what is reported.
SIMULATOR = """
#include <cstdio>
#include <cstring>
extern "C" int sim_launch_kernel(void*, const char* name, int (*run)(void*, char*, size_t,
                                 unsigned long long), void* context, void (*destroy)(void*)) {
  char error[256] = "";
  int failed = 0;
  for (unsigned long long seed = 0; seed < 3; ++seed) failed |= run(context, error, 256, seed);
  destroy(context);
  std::printf("%s: %d %s\\n", name, failed, error);
  std::fflush(stdout);
  return failed;
}
extern "C" long long sim_bytes_left(void*) { return 2048; }
extern "C" void sim_kernel_report(const char* members) { std::printf("{%s}\\n", members); }
"""

STREAM_LAUNCH = """
import ctypes, sys
if sys.argv[2] != "none":
    ctypes.CDLL(sys.argv[2], mode=ctypes.RTLD_GLOBAL)
import torch
library = ctypes.CDLL(sys.argv[1])
x, out = torch.arange(512.0), torch.zeros(512)
tiles = int(sys.argv[3])
rc = library.aclrtlaunch_scale_rows(
    ctypes.c_uint32(2), ctypes.c_void_p(), ctypes.c_void_p(x.data_ptr()),
    ctypes.c_void_p(out.data_ptr()), ctypes.c_uint32(tiles), ctypes.c_float(3.0))
print(rc, torch.equal(out, x * 3))
"""


@pytest.fixture(scope="module")
def simulator(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("simulator")
    (folder / "simulator.cpp").write_text(SIMULATOR)
    made = folder / "simulator.so"
    command = [*find_compiler(), "-shared", "-fPIC", str(folder / "simulator.cpp"), "-o", str(made)]
    subprocess.run(command, check=True)
    return made


def stream_launch(simulator: str, tiles: int) -> subprocess.CompletedProcess[str]:
    path = build.library_path("scale_rows", KERNELS)
    command = [sys.executable, "-c", STREAM_LAUNCH, str(path), simulator, str(tiles)]
    return subprocess.run(command, capture_output=True, text=True, check=True)


def test_launches_on_a_stream_report_to_the_simulated_npu(simulator: Path) -> None:
    lines = stream_launch(str(simulator), 8).stdout.splitlines()
    assert len(lines) == 5  # a report of each run, the end, the result
    assert '"bytes": 4096, "read": 2048, "written": 2048, "workspace": 0' in lines[0]
    assert '"reads": {"x": 2048}' in lines[0]
    assert '"bound": "memory", "clock_ghz": 1.800000, "cores": 2' in lines[0]
    assert lines[-2:] == ["scale_rows: 0 ", "0 True"]


def test_launches_on_a_stream_are_bounded_by_the_allocation(simulator: Path) -> None:
    lines = stream_launch(str(simulator), 9).stdout.splitlines()
    assert "leave its 2048 bytes" in lines[-2]
    assert lines[-1].startswith("1 ")


def test_launches_on_a_stream_need_the_simulated_npu() -> None:
    done = stream_launch("none", 8)
    assert done.stdout == "1 False\n"
    assert "scale_rows: no simulated NPU in this process" in done.stderr
