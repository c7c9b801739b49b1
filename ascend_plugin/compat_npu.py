"""Patches of vLLM 0.32.0 for workers of NPUs; the rules of ``compat.py`` hold here too."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

_MARK = "_ascend_plugin_patch"


def apply() -> None:
    """Apply every patch; safe to call more than once."""
    _skip_foreign_warmup()
    _take_weak_references()
    _capture_over_hccl()
    _order_weights_for_the_cube()
    _choose_experts_on_the_device()


def _skip_foreign_warmup() -> None:
    """Skip the warm-up of kernels that this device does not have.

    Why: ``kernel_warmup`` imports the models whose CUDA kernels it tunes, on every platform that
    is not a CPU; one of them needs torchvision, and the worker dies.
    Remove when: vLLM asks the platform before it warms up.
    """
    import vllm.v1.worker.gpu_worker as gpu_worker

    if getattr(gpu_worker.kernel_warmup, _MARK, False):
        return

    def kernel_warmup(worker: Any) -> None:
        """Do nothing: operators of an NPU are compiled ahead."""

    setattr(kernel_warmup, _MARK, True)
    gpu_worker.kernel_warmup = kernel_warmup


def _take_weak_references() -> None:
    """Make weak references to tensors with torch_npu.

    Why: ``weak_ref_tensor`` calls a CUDA kernel of vLLM's. Graphs need it: a reference that keeps
    its tensor alive would keep the memory of every graph's outputs.
    Remove when: vLLM lets platforms bring their own.
    """
    import vllm.utils.torch_utils as torch_utils

    if getattr(torch_utils.weak_ref_tensor, _MARK, False):
        return

    @functools.wraps(torch_utils.weak_ref_tensor)
    def weak_ref_tensor(tensor: Any) -> Any:
        from ascend_plugin.ops.npu.memory import weak_reference

        return weak_reference(tensor) if isinstance(tensor, torch.Tensor) else tensor

    setattr(weak_ref_tensor, _MARK, True)
    torch_utils.weak_ref_tensor = weak_ref_tensor


def _capture_over_hccl() -> None:
    """Let groups of NPUs capture graphs.

    Why: ``GroupCoordinator.graph_capture`` asserts that the communicator is CUDA's or XPU's.
    Remove when: it asks the communicator instead of its class.
    """
    from vllm.distributed import parallel_state

    group = parallel_state.GroupCoordinator
    if getattr(group.graph_capture, _MARK, False):
        return

    @contextmanager
    def graph_capture(self: Any, graph_capture_context: Any = None) -> Iterator[Any]:
        from ascend_plugin.ops.npu.device import npu

        context = graph_capture_context or parallel_state.GraphCaptureContext(npu.Stream())
        current = npu.current_stream()
        # What was launched before must be done before it is captured on another stream.
        if current != context.stream:
            context.stream.wait_stream(current)
        with npu.stream(context.stream):
            yield context

    setattr(graph_capture, _MARK, True)
    group.graph_capture = graph_capture


def _order_weights_for_the_cube() -> None:
    """Bring the weights of linear layers into NZ order, once, after they are loaded.

    Why: ``UnquantizedLinearMethod`` prepares weights for CPUs and XPUs only, and cannot be
    replaced by a platform.
    Remove when: vLLM lets platforms bring their own linear method.
    """
    from vllm.model_executor.layers.linear import UnquantizedLinearMethod

    original = UnquantizedLinearMethod.process_weights_after_loading
    if getattr(original, _MARK, False):
        return

    @functools.wraps(original)
    def process_weights_after_loading(self: Any, layer: torch.nn.Module) -> None:
        from ascend_plugin.ops.npu.linear import to_nz

        original(self, layer)
        weight: Any = layer.weight
        if weight.device.type == "npu":
            weight.data = to_nz(weight.data)

    setattr(process_weights_after_loading, _MARK, True)
    UnquantizedLinearMethod.process_weights_after_loading = process_weights_after_loading


def _choose_experts_on_the_device() -> None:
    """Choose the experts of tokens with operators of the NPU.

    Why: the router of models without groups of experts calls CUDA kernels of vLLM's, whatever the
    platform.
    Remove when: it dispatches by platform, like the router for groups does.
    """
    from vllm.model_executor.layers.fused_moe.router import fused_topk_router as router

    if getattr(router.vllm_topk_softmax, _MARK, False):
        return

    def patched(name: str) -> Any:
        def choose(
            weights: torch.Tensor,
            indices: torch.Tensor,
            rows: torch.Tensor,
            logits: torch.Tensor,
            renormalize: bool = False,
        ) -> tuple[torch.Tensor, torch.Tensor]:
            from ascend_plugin.ops.npu import experts

            chosen, ids = getattr(experts, name)(logits, indices.shape[1], renormalize)
            return chosen, ids.to(indices.dtype)

        setattr(choose, _MARK, True)
        return choose

    router.vllm_topk_softmax = patched("choose_softmax")
    router.vllm_topk_sigmoid = patched("choose_sigmoid")
