"""The worker of an NPU: one process, one device."""

from __future__ import annotations

import gc
import logging
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
from vllm.config import CUDAGraphMode
from vllm.platforms import current_platform
from vllm.utils.mem_utils import MemorySnapshot, format_gib
from vllm.utils.torch_utils import set_random_seed
from vllm.v1.worker.gpu_worker import Worker, init_worker_distributed_environment
from vllm.v1.worker.utils import request_memory

from ascend_plugin.attention.kv_quantisation import quantise_layers
from ascend_plugin.attention.mla_npu import bind_latents, lay_out_projections
from ascend_plugin.attention.npu import bind_pages
from ascend_plugin.attention.npu_counters import follow_counters
from ascend_plugin.compat import apply_npu_patches, apply_worker_patches
from ascend_plugin.config import parse_config
from ascend_plugin.ops.dispatch import set_policy
from ascend_plugin.ops.npu import library as npu_operators
from ascend_plugin.ops.npu.device import npu
from ascend_plugin.spec_decode.prepare import prepare_drafter

from .npu_layers import register_layers
from .npu_moe import register_experts
from .npu_runner import AscendNPUModelRunner

if TYPE_CHECKING:
    from vllm.v1.kv_cache_interface import KVCacheConfig
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner

logger = logging.getLogger(__name__)


class AscendNPUWorker(Worker):
    """vLLM's device worker with the plugin's settings applied in its process."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        """Apply the plugin's settings; arguments as in ``Worker``."""
        super().__init__(*args, **kwargs)
        self.plugin_config = parse_config(self.vllm_config.additional_config)
        set_policy(self.plugin_config.ops.implementation)
        apply_worker_patches()
        apply_npu_patches()
        npu_operators.register()
        register_layers()
        register_experts()

    def _maybe_get_memory_pool_context(self, tag: str) -> AbstractContextManager[Any]:
        """Return nothing to enter: memory that can be put to sleep is not served here."""
        return nullcontext()

    def init_device(self) -> None:
        """Take the device, join the group of workers, and measure free memory.

        Raises:
            ValueError: there are fewer devices than workers, or the model's type is not served.
        """
        count = torch.accelerator.device_count()
        if self.local_rank >= count:
            raise ValueError(
                f"worker {self.local_rank} has no NPU: torch_npu sees {count}. Lower "
                "--tensor-parallel-size, or set ASCEND_RT_VISIBLE_DEVICES to more devices."
            )
        index = current_platform.logical_device_id_to_visible_device_id(self.local_rank)
        self.device = torch.device(f"npu:{index}")
        npu.set_device(self.device)
        current_platform.check_if_supports_dtype(self.model_config.dtype)
        init_worker_distributed_environment(
            self.vllm_config,
            self.rank,
            self.distributed_init_method,
            self.local_rank,
            current_platform.dist_backend,
        )
        set_random_seed(self.model_config.seed)
        gc.collect()
        release_cached_memory()
        # After the group exists: what hccl takes is not free.
        self.init_snapshot = MemorySnapshot(device=self.device)
        self.requested_memory = request_memory(self.init_snapshot, self.cache_config)
        self._init_workspace_and_model_runner()

    def _make_model_runner(self) -> GPUModelRunner:
        return AscendNPUModelRunner(self.vllm_config, self.device)

    def load_model(self, **kwargs: Any) -> None:
        """Load the model; tell its layers how their cache is scaled, its drafter how to draft."""
        from vllm.distributed import get_tensor_model_parallel_rank as rank
        from vllm.distributed import get_tensor_model_parallel_world_size as world

        super().load_model(**kwargs)
        lay_out_projections(self.vllm_config)
        quantise_layers(self.vllm_config, self.plugin_config.kv_cache, rank(), world())
        prepare_drafter(self.vllm_config, self.model_runner, self.plugin_config.speculation)

    def execute_model(self, *args: Any, **kwargs: Any) -> Any:
        """Run a step; arguments as in ``Worker``."""
        output = super().execute_model(*args, **kwargs)
        follow_counters()
        return output

    @torch.inference_mode()
    def determine_available_memory(self) -> int:
        """Return the bytes that the KV cache may take: what model and graphs leave."""
        available = int(super().determine_available_memory())
        mode = self.vllm_config.compilation_config.cudagraph_mode
        if self.cache_config.kv_cache_memory_bytes or mode == CUDAGraphMode.NONE:
            return available
        graphs = int(self.model_runner.profile_cudagraph_memory())
        self.cudagraph_memory_estimate = graphs
        self.peak_activation_memory += graphs
        self.available_kv_cache_memory_bytes = available - graphs
        logger.info(
            "Captured graphs will take about %s GiB; the KV cache gets %s GiB.",
            format_gib(graphs),
            format_gib(available - graphs),
        )
        return available - graphs

    def initialize_from_config(self, kv_cache_config: KVCacheConfig) -> None:
        """Allocate the KV cache and tell every layer where its pages are."""
        super().initialize_from_config(kv_cache_config)
        bind_pages(self.vllm_config)
        bind_latents(self.vllm_config)


def release_cached_memory() -> None:
    """Give cached blocks back to the driver.

    The device is waited for first: ``torch.accelerator.empty_cache`` waits too, and would hold the
    interpreter while it does.
    """
    npu.synchronize()
    torch.accelerator.empty_cache()
