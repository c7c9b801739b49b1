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
    _choose_grouped_experts_on_the_device()


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
        # Set by MLA layers: they read the weight once, element by element, and never multiply it.
        absorbed = getattr(layer, "_cpu_skip_gemm_dispatch", False)
        if weight.device.type == "npu" and not absorbed:
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


def _choose_grouped_experts_on_the_device() -> None:
    """Choose experts by groups, or with a bias, with operators of the NPU.

    Why: with a bias the router calls CUDA kernels of vLLM's, whatever the platform; by groups it
    calls a dozen torch operators through torch.compile, which the NPU has one operator for.
    Remove when: these routers dispatch by platform.
    """
    from vllm.model_executor.layers.fused_moe.router import (
        fused_topk_bias_router,
        grouped_topk_router,
    )

    if getattr(grouped_topk_router.grouped_topk, _MARK, False):
        return

    def grouped_topk(
        hidden_states: torch.Tensor,
        gating_output: torch.Tensor,
        topk: int,
        renormalize: bool,
        num_expert_group: int = 0,
        topk_group: int = 0,
        scoring_func: str = "softmax",
        routed_scaling_factor: float = 1.0,
        e_score_correction_bias: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        from ascend_plugin.ops.npu.experts import Grouping, choose_grouped

        sigmoid = _is_sigmoid(scoring_func)
        groups = (max(1, num_expert_group), max(1, topk_group))
        how = Grouping(topk, *groups, sigmoid, renormalize, routed_scaling_factor)
        return choose_grouped(gating_output, e_score_correction_bias, how)

    setattr(grouped_topk, _MARK, True)
    grouped_topk_router.grouped_topk = grouped_topk
    fused_topk_bias_router.vllm_topk_softmax = _choose_biased(sigmoid=False)
    fused_topk_bias_router.vllm_topk_sigmoid = _choose_biased(sigmoid=True)


def _is_sigmoid(scoring_func: str) -> bool:
    if scoring_func not in ("softmax", "sigmoid"):
        raise ValueError(
            f"experts are not chosen by {scoring_func!r} on an NPU; allowed are 'softmax' and "
            "'sigmoid'. Set ASCEND_PLUGIN_DEVICE=cpu to serve on the CPU."
        )
    return scoring_func == "sigmoid"


def _choose_biased(sigmoid: bool) -> Any:
    """Return what stands for a kernel of vLLM's that chooses experts with a bias."""

    def choose(
        weights: torch.Tensor,
        indices: torch.Tensor,
        rows: torch.Tensor,
        logits: torch.Tensor,
        renormalize: bool = False,
        bias: torch.Tensor | None = None,
        scale: float = 1.0,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        from ascend_plugin.ops.npu.experts import Grouping, choose_grouped

        how = Grouping(indices.shape[1], 1, 1, sigmoid, renormalize, scale)
        chosen, ids = choose_grouped(logits, bias, how)
        return chosen, ids.to(indices.dtype)

    return choose
