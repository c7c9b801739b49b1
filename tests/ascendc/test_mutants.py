"""The mutation check: what it finds in a kernel, and its verdicts on a tiny one."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

#: Out = 2 * in + 1, and the greatest of each tile. Every line that synchronises is needed, but for
#: the one that says so.
KERNEL = """
#include "kernel_operator.h"
using namespace AscendC;
class Tiny {
 public:
  __aicore__ inline void Run(GM_ADDR in, GM_ADDR out, uint32_t tiles) {
    in_.SetGlobalBuffer((__gm__ float*)in);
    out_.SetGlobalBuffer((__gm__ float*)out);
    pipe_.InitBuffer(from_, 2, 256);
    pipe_.InitBuffer(to_, 2, 256);
    pipe_.InitBuffer(doubled_, 256);
    PipeBarrier<PIPE_V>();  // redundant
    for (uint32_t i = GetBlockIdx(); i < tiles; i += GetBlockNum()) {
      Tile(i);
    }
  }

 private:
  __aicore__ inline void Tile(uint32_t i) {
    LocalTensor<float> x = from_.AllocTensor<float>();
    DataCopy(x, in_[i * 64], 64);
    from_.EnQue(x);
    x = from_.DeQue<float>();
    LocalTensor<float> y = to_.AllocTensor<float>();
    LocalTensor<float> doubled = doubled_.Get<float>();
    Muls(doubled, x, 2.0f, 64);
    PipeBarrier<PIPE_V>();  // needed
    Adds(y, doubled, 1.0f, 64);
    from_.FreeTensor(x);
    SetFlag<HardEvent::V_S>(EVENT_ID0);
    WaitFlag<HardEvent::V_S>(EVENT_ID0);
    if (y.GetValue(0) < 0.0f) {
      Muls(y, doubled, 0.0f, 64);
    }
    PipeBarrier<PIPE_V>();  // needed: doubled is used again
    to_.EnQue(y);
    y = to_.DeQue<float>();
    DataCopy(out_[i * 64], y, 64);
    to_.FreeTensor(y);
  }

  TPipe pipe_;
  TQue<TPosition::VECIN, 2> from_;
  TQue<TPosition::VECOUT, 2> to_;
  TBuf<TPosition::VECCALC> doubled_;
  GlobalTensor<float> in_, out_;
};
extern "C" __global__ __aicore__ void tiny(GM_ADDR in, GM_ADDR out, uint32_t tiles) {
  Tiny kernel;
  kernel.Run(in, out, tiles);
}
"""

TEST = """
import torch
from ascend_plugin.ops.ascendc import host

def test_quick():
    x = torch.arange(9 * 64.0).view(9, 64) - 99.0
    expected = torch.where(x[:, :1] * 2 + 1 < 0, 0.0, x * 2 + 1)
    for schedule in host.schedules(8):
        out = torch.full_like(x, torch.nan)
        host.library("tiny").launch("tiny", 2, [x, out, 9], schedule=schedule, strict=True)
        assert torch.equal(out, expected)
"""

SYNCHRONISED = """
#include "kernel_operator.h"
template <HardEvent event>
__aicore__ inline void Order() {
  SetFlag<event>(EVENT_ID0);
  WaitFlag<event>(EVENT_ID0);
}
void Kernel() {
  SetFlag<HardEvent::MTE3_V>(a);  // PipeBarrier<PIPE_V>(); in a comment
  SetFlag<HardEvent::MTE3_V>(b);
  for (uint32_t i = 0; i < rows; ++i) {
    WaitFlag<HardEvent::MTE3_V>(a);
    Order<HardEvent::V_S>();
    WaitFlag<HardEvent::MTE3_V>(b);
  }
  CrossCoreSetFlag<2, PIPE_MTE3>(kDone);
  CrossCoreWaitFlag(kDone);
  SyncAll<true>();
}
"""


def _run(repository: Path, *arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, repository / "tools/ascendc_mutants.py", *arguments]
    text = [str(each) for each in command]
    return subprocess.run(text, capture_output=True, text=True, check=False)


def _listed(repository: Path, folder: Path, source: str, kinds: str) -> list[str]:
    (folder / "some.cpp").write_text(source)
    done = _run(repository, "some", "--kernels-dir", folder, "--kinds", kinds, "--list")
    assert done.returncode == 0, done.stderr
    return [line.removeprefix("some: ") for line in done.stdout.splitlines()]


def test_finds_each_synchronisation_once(repository: Path, tmp_path: Path) -> None:
    found = _listed(repository, tmp_path, SYNCHRONISED, "synchronisation")
    assert [line.split(": ")[0] for line in found] == [
        "flag some.cpp:9",
        "flag some.cpp:10",
        "flag some.cpp:13",  # a call of the helper, not the helper
        "cross_flag some.cpp:16",
        "sync_all some.cpp:18",
    ]


def test_finds_bounds_strides_and_offsets(repository: Path, tmp_path: Path) -> None:
    source = """
    for (uint32_t i = 0; i < rows; ++i) {
      DataCopyPad(x[i * 8], gm_[i], DataCopyExtParams(rows, 4 * n, gap, 0, 0), pad);
      DataCopyPad(gm_[0], x, DataCopyExtParams(1, 4, 0, 0, 0));
      DataCopy(x, gm_, 64);
      params.srcStride = wide - 1;
    }
    """
    bounds = _listed(repository, tmp_path, source, "bound")
    assert bounds == [
        f"bound some.cpp:{line}: {text}: {change}"
        for line, text in [(2, "rows"), (3, "rows"), (3, "4 * n"), (4, "1"), (4, "4"), (5, "64")]
        for change in ("+ 1", "- 1")
    ]
    strides = _listed(repository, tmp_path, source, "stride")
    assert [line.partition(": ")[2] for line in strides] == [
        *("gap: + 1", "gap: - 1", "0: + 1"),
        *("wide - 1: + 1", "wide - 1: - 1"),
    ]
    alignments = _listed(repository, tmp_path, source, "alignment")
    assert [line.partition(": ")[2] for line in alignments] == ["i * 8: + 1", "i: + 1", "0: + 1"]


@pytest.mark.slow
def test_verdicts(repository: Path, tmp_path: Path) -> None:
    """What is needed is killed, what is redundant survives, and the exit status says so."""
    kernels, tests = tmp_path / "kernels", tmp_path / "tests"
    for folder, name, text in ((kernels, "tiny.cpp", KERNEL), (tests, "test_tiny.py", TEST)):
        folder.mkdir()
        (folder / name).write_text(text)
    folders = ("--kernels-dir", kernels, "--tests-dir", tests)
    done = _run(repository, "tiny", *folders, "--kinds", "flag,barrier,queue", "--json", "-j", 2)
    assert done.stdout, done.stderr
    report = json.loads(done.stdout)
    redundant = KERNEL.splitlines().index("    PipeBarrier<PIPE_V>();  // redundant") + 1
    assert [(each["kind"], each["line"]) for each in report["survivors"]] == [
        ("barrier", redundant)
    ], done.stderr
    assert report["kernels"]["tiny"] == {
        "flag": {"killed": 1},
        "barrier": {"survived": 1, "killed": 2},
        "queue": {"killed": 2},
    }
    assert report["synchronisation_percent"] == pytest.approx(500 / 6)
    assert done.returncode == 1, "5 of 6 is less than the bar"
