"""Kernels of vLLM's sampler in operators of torch, for every device. Names are vLLM's.

Source: ``vllm/v1/sample/rejection_sampler.py``.
"""

from __future__ import annotations

import torch
from torch import Tensor


def owner_of(ends: Tensor, tokens: int) -> Tensor:
    """Return which sequence each token belongs to, for the ends of all sequences."""
    places = torch.arange(tokens, device=ends.device, dtype=ends.dtype)
    return (places[:, None] >= ends[None, :]).sum(1)


def expand(
    output_ptr: Tensor,
    input_ptr: Tensor,
    cu_num_tokens_ptr: Tensor,
    replace_from: float,
    replace_to: float,
    MAX_NUM_TOKENS: int = 0,
) -> None:
    """Give every token the value of its sequence, with one value replaced by another."""
    if output_ptr.shape[0] == 0:
        return
    owner = owner_of(cu_num_tokens_ptr, output_ptr.shape[0]).clamp(max=input_ptr.shape[0] - 1)
    values = torch.where(input_ptr == replace_from, replace_to, input_ptr)
    output_ptr.copy_(values.index_select(0, owner))


def replace_on_cpus() -> None:
    """Let vLLM expand values of sequences to tokens with :func:`expand` on a CPU too.

    Why: its C++ kernel takes integers only, and what it is given beside the output is a copy: the
    expanded temperature, top-k and top-p of drafts stay what the memory held before. Speculation
    then draws from another distribution.
    Remove when: ``cpu_triton_utils._expand_kernel_impl`` writes outputs that are not int64.
    """
    from vllm.triton_utils.dispatcher import register_kernels

    register_kernels({"vllm.v1.sample.rejection_sampler.expand_kernel": expand})
