"""The report that names calls of torch_npu which no test executed."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

SOURCE = """
import torch_npu
from .device import npu

def used(x):
    npu.synchronize()
    return torch_npu.npu_swiglu(
        x,
    )

def unused(x):
    return _npu().get_device_name(x), torch.ops.npu.npu_rms_norm(x), other.npu.thing(x)
"""


def _report(root: Path, *executed: int) -> subprocess.CompletedProcess[str]:
    """Run the tool over a tree with one file, of which these lines were executed."""
    code = f"""
import sys
from pathlib import Path
sys.path.insert(0, {str(root / "tools")!r})
import npu_call_sites as tool
tool.ROOT = Path({str(root)!r})
from coverage import CoverageData
data = CoverageData({str(root / ".coverage")!r})
data.add_lines({{str(tool.ROOT / "ops/npu.py"): {list(executed)!r}}})
data.write()
sys.argv = ["npu_call_sites.py", "--data", {str(root / ".coverage")!r}]
sys.exit(tool.main())
"""
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)


def _tree(tmp_path: Path, repository: Path) -> Path:
    for room in ("ascend_plugin", "ops", "graph", "tools"):
        (tmp_path / room).mkdir()
    tool = repository / "tools" / "npu_call_sites.py"
    (tmp_path / "tools" / tool.name).write_text(tool.read_text())
    (tmp_path / "ops" / "npu.py").write_text(SOURCE)
    return tmp_path


def test_calls_that_never_ran_are_named(tmp_path, repository):
    done = _report(_tree(tmp_path, repository), 6, 7)
    assert done.returncode == 1, done.stderr
    assert done.stdout.splitlines() == [
        "ops/npu.py:12: _npu().get_device_name: NEVER EXECUTED",
        "ops/npu.py:12: torch.ops.npu.npu_rms_norm: NEVER EXECUTED",
        "calls of torch_npu: 4, never executed: 2",
    ]


def test_all_executed(tmp_path, repository):
    done = _report(_tree(tmp_path, repository), 6, 7, 12)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == ["calls of torch_npu: 4, never executed: 0"]


def test_nothing_found_is_a_failure(tmp_path, repository):
    root = _tree(tmp_path, repository)
    (root / "ops" / "npu.py").write_text("")
    assert _report(root).returncode == 1
