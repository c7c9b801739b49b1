"""The worker of the CPU fallback."""

from __future__ import annotations

import logging
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from vllm.config import CompilationMode
from vllm.v1.worker.cpu_worker import CPUWorker

from ascend_plugin.attention.kv_quantisation import check_bound_pages, quantise_layers
from ascend_plugin.compat import apply_worker_patches
from ascend_plugin.config import parse_config
from ascend_plugin.graph.cpu import Pool
from ascend_plugin.ops.dispatch import set_policy
from ascend_plugin.ops.native import memory
from ascend_plugin.spec_decode.prepare import prepare_drafter
from ascend_plugin.worker.cpu_gemma import fold_norms
from ascend_plugin.worker.cpu_memory import LoadReport, measure_load, use_huge_pages
from ascend_plugin.worker.cpu_process import is_shared, use_cores
from ascend_plugin.worker.cpu_steps import RecordedSteps, refusal

if TYPE_CHECKING:
    from vllm.v1.kv_cache_interface import KVCacheConfig

logger = logging.getLogger(__name__)


class AscendCPUWorker(CPUWorker):
    """vLLM's CPU worker with the plugin's settings applied in its process."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        """Apply the plugin's settings; arguments as in ``CPUWorker``."""
        super().__init__(*args, **kwargs)
        self.plugin_config = parse_config(self.vllm_config.additional_config)
        set_policy(self.plugin_config.ops.implementation)
        apply_worker_patches()
        self.recorded_steps: list[RecordedSteps] = []
        self.load_report: LoadReport | None = None

    def init_device(self) -> None:
        """Take every core where the model shares the scheduler's process."""
        if is_shared(self.vllm_config):
            use_cores()
        super().init_device()

    def load_model(self, **kwargs: Any) -> None:
        """Load the model and prepare it; log what that took."""
        load_format = self.vllm_config.load_config.load_format
        files = None if load_format == "dummy" else Path(self.vllm_config.model_config.model)
        self.load_report = measure_load(partial(self._load_model, **kwargs), files)

    def _load_model(self, **kwargs: Any) -> None:
        """Load the model; tell its layers how their cache is scaled, its drafter how to draft."""
        from vllm.distributed import get_tensor_model_parallel_rank as rank
        from vllm.distributed import get_tensor_model_parallel_world_size as world

        super().load_model(**kwargs)
        quantise_layers(self.vllm_config, self.plugin_config.kv_cache, rank(), world())
        prepare_drafter(self.vllm_config, self.model_runner, self.plugin_config.speculation)
        self._fold_norms()
        self._record_steps()
        if self.plugin_config.weights.huge_pages:
            use_huge_pages(self._models())

    def _models(self) -> list[torch.nn.Module]:
        """Return the model, and the one that drafts for it if there is one."""
        runner = self.model_runner
        found = (runner.model, getattr(getattr(runner, "drafter", None), "model", None))
        return [model for model in found if isinstance(model, torch.nn.Module)]

    def _fold_norms(self) -> None:
        """Prepare norms of models that are not compiled, whose compiler does that too."""
        if self.vllm_config.compilation_config.mode == CompilationMode.NONE:
            fold_norms(self.model_runner.model)

    def _record_steps(self) -> None:
        """Let the runner record and repeat decode steps, where nothing speaks against it."""
        reason = refusal(self.vllm_config)
        if reason is not None:
            logger.info("Decode steps run operator by operator: %s.", reason)
            return
        pool, runner = Pool(), self.model_runner
        # vLLM means it to be overridden; as an attribute, because vLLM makes the runner.
        runner._model_forward = RecordedSteps(runner._model_forward, pool)
        self.recorded_steps = [runner._model_forward]
        for draft in self._models()[1:]:
            draft.forward = RecordedSteps(draft.forward, pool, "Draft")
            self.recorded_steps.append(draft.forward)

    def initialize_from_config(self, kv_cache_config: KVCacheConfig) -> None:
        """Allocate the KV cache, on huge pages where the kernel grants them."""
        super().initialize_from_config(kv_cache_config)
        self._forget_steps()
        check_bound_pages(self.vllm_config)
        if self.plugin_config.kv_cache.huge_pages:
            self._use_huge_pages()

    def reload_weights(self, *args: Any, **kwargs: Any) -> None:
        """Load weights again; arguments as in vLLM's worker."""
        super().reload_weights(*args, **kwargs)
        self._forget_steps()

    def update_weights(self, update_info: dict[str, Any] | list[dict[str, Any]]) -> None:
        """Take weights from a trainer; argument as in vLLM's worker."""
        super().update_weights(update_info)
        self._forget_steps()

    def _forget_steps(self) -> None:
        """Record anew: addresses may have changed, and weights."""
        self._fold_norms()
        for steps in self.recorded_steps:
            steps.forget()

    def _use_huge_pages(self) -> None:
        """Move the still empty KV cache to huge pages.

        A decode step streams whole pages of the cache; with 4 KiB pages of memory the TLB misses
        cost 10 to 30 %.
        """
        seen: set[int] = set()
        for cache in self.model_runner.kv_caches:
            storage = cache.untyped_storage()
            if storage.data_ptr() in seen:
                continue
            seen.add(storage.data_ptr())
            granted = memory.back_zeroed_with_huge_pages(cache)
            logger.info(
                "KV cache of %.2f GiB %s transparent huge pages.",
                storage.nbytes() / 2**30,
                "uses" if granted else "cannot use",
            )
