"""vLLM's model runner on an NPU: the names of CUDA that it uses mean the NPU's."""

from __future__ import annotations

import gc
import logging
from functools import partial
from typing import Any

import torch
from vllm.compilation.cuda_graph import CUDAGraphWrapper
from vllm.compilation.monitor import set_cudagraph_capturing_enabled
from vllm.config import CUDAGraphMode
from vllm.v1.worker.gpu_model_runner import GPUModelRunner

from ascend_plugin.graph import npu as graphs
from ascend_plugin.ops.npu.device import npu

logger = logging.getLogger(__name__)


def name_npu_as_cuda() -> None:
    """Make ``torch.cuda``'s streams, events and graphs those of the NPU in this process.

    vLLM's runner and graph wrapper name them so; what else they need is ``torch.accelerator``.
    Each name gets an object of its own: Dynamo refuses two names for one function. Source of the
    list: ``vllm/v1/worker/xpu_model_runner.py``.
    """
    cuda: Any = torch.cuda

    def event(*args: Any, blocking: bool | None = None, **kwargs: Any) -> Any:
        return npu.Event(*args, **kwargs)  # an NPU's events do not know "blocking"

    cuda.Stream = npu.Stream
    cuda.Event = event
    for name in ("default_stream", "current_stream", "stream", "set_stream"):
        setattr(cuda, name, partial(getattr(npu, name)))
    cuda.graph = partial(npu.graph)
    cuda.CUDAGraph = graphs.NPUGraph
    cuda.graph_pool_handle = partial(npu.graph_pool_handle)
    cuda.is_current_stream_capturing = partial(npu.is_current_stream_capturing)


class AscendNPUModelRunner(GPUModelRunner):
    """vLLM's model runner (V1)."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        """Name the device's objects, then build the runner; arguments as in ``GPUModelRunner``."""
        name_npu_as_cuda()
        super().__init__(*args, **kwargs)

    def capture_model(self) -> int:
        """Capture the graphs; return the bytes they take.

        If a limit of the device is reached, one device goes on without graphs. Several do not: the
        others would pad their batches for graphs, and collectives would not fit.

        Raises:
            RuntimeError: the capture failed for another reason, or on one of several devices.
        """
        try:
            return int(super().capture_model())
        except RuntimeError as error:
            limit = graphs.limit_reached(error)
            remedy = (
                "Lower --gpu-memory-utilization or --kv-cache-memory-bytes, or capture fewer sizes "
                "(-cc.cudagraph_capture_sizes=[1,2,4])."
            )
            if not limit:
                raise
            if self.parallel_config.world_size > 1:
                raise RuntimeError(
                    f"The graphs need more {limit} than there is. {remedy}"
                ) from error
            logger.warning(
                "The graphs need more %s than there is: serving eagerly. %s", limit, remedy
            )
        self._serve_eagerly()
        return 0

    def _serve_eagerly(self) -> None:
        graphs.abandon_capture()
        set_cudagraph_capturing_enabled(False)
        self.cudagraph_dispatcher.cudagraph_mode = CUDAGraphMode.NONE
        CUDAGraphWrapper.clear_all_graphs()
        gc.collect()
        npu.synchronize()
        torch.accelerator.empty_cache()
