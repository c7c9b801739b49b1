"""The entry points: what they return, what they import, and how vLLM resolves them."""

from __future__ import annotations

from importlib import metadata
from pathlib import Path

import pytest
from installed import BROKEN_TORCH_NPU, TORCH_NPU, write_metadata, write_module
from processes import run_python

CPU = "ascend_plugin.platform.cpu.AscendCPUPlatform"
NPU = "ascend_plugin.platform.npu.AscendNPUPlatform"

REGISTER = """
import sys, time
before = time.perf_counter()
import ascend_plugin
names = [ascend_plugin.register_platform() for _ in range(2)]
print("seconds", round(time.perf_counter() - before, 3), file=sys.stderr)
print(names)
print(sorted(m for m in ("torch", "vllm", "torch_npu", "pydantic") if m in sys.modules))
"""

RESOLVE = """
from vllm.platforms import current_platform
print(type(current_platform).__module__ + "." + type(current_platform).__qualname__)
"""


def _last_line(text: str) -> str:
    return text.strip().splitlines()[-1]


def test_register_platform_imports_nothing_heavy() -> None:
    done = run_python(REGISTER)
    assert done.returncode == 0, done.stderr
    print(done.stderr)  # how long it took: shown, not judged
    assert done.stdout.splitlines() == [str([CPU, CPU]), "[]"]


@pytest.mark.parametrize(
    ("source", "variables", "name", "reason"),
    [
        (TORCH_NPU.format(count=1), {}, NPU, "torch_npu sees 1 NPU(s)"),
        (TORCH_NPU.format(count=8), {"ASCEND_PLUGIN_DEVICE": ""}, NPU, "torch_npu sees 8 NPU(s)"),
        (
            TORCH_NPU.format(count=1),
            {"ASCEND_PLUGIN_DEVICE": "CPU"},
            CPU,
            "ASCEND_PLUGIN_DEVICE=cpu is set",
        ),
        (TORCH_NPU.format(count=0), {}, CPU, "torch_npu sees no NPU (check npu-smi"),
        (BROKEN_TORCH_NPU, {}, CPU, "does not import: ImportError: libhccl.so: cannot open shared"),
        ("raise OSError", {}, CPU, "torch_npu does not import: OSError: no message"),
        ("npu = None", {}, CPU, "torch_npu cannot count NPUs: AttributeError: 'NoneType' object"),
    ],
    ids=["npu", "npus", "kill switch", "no npu", "broken", "no message", "cannot count"],
)
def test_torch_npu_decides(
    tmp_path: Path, source: str, variables: dict, name: str, reason: str
) -> None:
    path = write_module(tmp_path, "torch_npu", source)
    code = REGISTER + "from ascend_plugin.device import detect_device\nprint(detect_device())\n"
    done = run_python(code, path=(path,), env=variables)
    assert done.returncode == 0, done.stderr
    told = done.stdout.splitlines()
    assert told[0] == str([name, name])
    assert reason in told[-1]


def test_entry_points_are_installed() -> None:
    found = {
        point.group: point.load()
        for point in metadata.distribution("ascend-plugin").entry_points
        if point.group.startswith("vllm.")
    }
    import ascend_plugin

    assert found["vllm.platform_plugins"] is ascend_plugin.register_platform
    assert found["vllm.general_plugins"] is ascend_plugin.register_general


def test_vllm_takes_the_plugin_before_its_own_platform() -> None:
    done = run_python(RESOLVE)
    assert done.returncode == 0, done.stderr
    assert _last_line(done.stdout) == CPU


def test_without_plugins_vllm_is_untouched() -> None:
    done = run_python(RESOLVE, env={"VLLM_PLUGINS": "none"})
    assert done.returncode == 0, done.stderr
    assert _last_line(done.stdout) == "vllm.platforms.cpu.CpuPlatform"


def test_two_platform_plugins_need_a_choice(tmp_path: Path) -> None:
    rival = "def register():\n    return 'vllm.platforms.cpu.CpuPlatform'\n"
    path = write_module(tmp_path, "rival", rival)
    write_metadata(tmp_path, "rival", "1.0", {"vllm.platform_plugins": {"rival": "rival:register"}})
    both = run_python(RESOLVE, path=(path,))
    assert both.returncode == 1
    assert "RuntimeError: Only one platform plugin can be activated, but got:" in both.stderr
    chosen = run_python(RESOLVE, path=(path,), env={"VLLM_PLUGINS": "ascend,ascend_general"})
    assert chosen.returncode == 0, chosen.stderr
    assert _last_line(chosen.stdout) == CPU


def test_register_general_can_run_twice() -> None:
    done = run_python(
        "import logging, ascend_plugin\n"
        "from vllm.renderers.base import BaseRenderer\n"
        "stock = BaseRenderer.validate_token_ids\n"
        "seen = []\n"
        "for _ in range(3):\n"
        "    ascend_plugin.register_general()\n"
        "    handlers = logging.getLogger('ascend_plugin').handlers\n"
        "    seen.append((id(BaseRenderer.validate_token_ids), len(handlers)))\n"
        "print(len(set(seen)), BaseRenderer.validate_token_ids is stock)\n"
        "print(BaseRenderer.validate_token_ids.__wrapped__ is stock)\n"
        "print(handlers == logging.getLogger('vllm').handlers)\n",
        env={"VLLM_PLUGINS": "none"},
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-3:] == ["1 False", "True", "True"]
