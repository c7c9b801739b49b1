"""``doctor`` in real environments: healthy, with a rival plugin, with a broken torch_npu."""

from __future__ import annotations

import json

import pytest
from machine_keys import MACHINE_KEYS


def _rows(done) -> dict[str, dict[str, str]]:
    return {row["name"]: row for row in json.loads(done.stdout)["rows"]}


@pytest.mark.slow
def test_this_environment(run_cli):
    done = run_cli("doctor", "--json")
    result = json.loads(done.stdout)
    assert set(result) == {"rows", "meta"}
    assert set(result["meta"]) == MACHINE_KEYS
    assert set(result["meta"]["versions"]) == {"ascend-plugin", "vllm", "torch", "python"}
    rows = _rows(done)
    for row in rows.values():
        assert set(row) == {"name", "status", "detail", "remedy"}
        assert row["status"] in ("ok", "warning", "problem")
        assert bool(row["remedy"]) == (row["status"] != "ok"), row
    assert done.returncode == any(row["status"] == "problem" for row in rows.values())
    assert rows["platform that vLLM chooses"]["detail"].startswith("ascend_plugin.platform.")
    for name in ("paged_attention", "kv_cache_write"):
        for variant in ("bf16", "fp16", "fp32", "c8d", "c8s", "c8p"):
            assert f"operator {name}, {variant} pages" in rows


@pytest.mark.slow
def test_a_rival_platform_plugin_is_explained(run_cli, make_distribution):
    folder = make_distribution(
        "vllm-ascend",
        "0.1",
        "def register():\n    return 'vllm.platforms.cpu.CpuPlatform'\n",
        # Not "ascend", which the real vllm-ascend uses: then vLLM does not even notice.
        {"vllm.platform_plugins": "rival = vllm_ascend:register"},
    )
    done = run_cli("doctor", "--json", env={"PYTHONPATH": str(folder), "VLLM_PLUGINS": None})
    rows = _rows(done)
    assert done.returncode == 1
    conflict = rows["platform plugins"]
    assert conflict["status"] == "problem"
    assert "rival (vllm_ascend:register, from vllm-ascend)" in conflict["detail"]
    assert "VLLM_PLUGINS=ascend,ascend_general" in conflict["remedy"]
    chosen = rows["platform that vLLM chooses"]
    assert chosen["status"] == "problem"
    assert "Only one platform plugin can be activated" in chosen["detail"]


@pytest.mark.slow
def test_a_broken_torch_npu_is_explained(run_cli, make_distribution):
    folder = make_distribution(
        "torch-npu",
        "2.13.0",
        "raise ImportError('libhccl.so: cannot open shared object file')\n",
        {"torch.backends": "torch_npu = torch_npu:_autoload"},
    )
    done = run_cli(
        "doctor",
        "--json",
        env={"PYTHONPATH": str(folder), "TORCH_DEVICE_BACKEND_AUTOLOAD": None},
    )
    rows = _rows(done)
    assert done.returncode == 1
    assert rows["device"]["status"] == "warning"
    assert "libhccl.so" in rows["device"]["detail"]
    imported = rows["import torch"]
    assert imported["status"] == "problem"
    assert "torch_npu" in imported["detail"]
    assert "TORCH_DEVICE_BACKEND_AUTOLOAD=0" in imported["remedy"]
    # The operators were asked all the same: the doctor itself survives.
    assert "operator paged_attention, bf16 pages" in rows
