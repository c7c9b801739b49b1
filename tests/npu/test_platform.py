"""What the platform and the runner ask of the device outside of serving."""

from __future__ import annotations

import torch
from processes import run_python

#: In a process of its own: it renames parts of torch.
RUNNER = """
from types import SimpleNamespace
import torch, torch_npu
from vllm.config import CUDAGraphMode
from ascend_plugin.worker.npu_runner import AscendNPUModelRunner, name_npu_as_cuda

torch.npu.set_device(0)
name_npu_as_cuda()
event = torch.cuda.Event(blocking=True)
x = torch.ones(4, device="npu") + 1
event.record()
event.synchronize()
assert event.query() and x.sum().item() == 8

runner = SimpleNamespace(cudagraph_dispatcher=SimpleNamespace(cudagraph_mode=CUDAGraphMode.FULL))
del x
AscendNPUModelRunner._serve_eagerly(runner)
assert runner.cudagraph_dispatcher.cudagraph_mode is CUDAGraphMode.NONE
assert torch.npu.memory_reserved() == 0, "memory of given up graphs stays"
print("done")
"""


def test_the_device_is_set_and_described(device: torch.device) -> None:
    from ascend_plugin.platform.npu import AscendNPUPlatform

    AscendNPUPlatform.set_device(device)
    assert torch.npu.current_device() == device.index
    assert AscendNPUPlatform.num_compute_units() >= 0


def test_events_of_the_runner_and_the_way_back_from_graphs() -> None:
    done = run_python(RUNNER)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.endswith("done\n")
