"""The best tokens of each beam on an NPU: one AscendC kernel."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..ascendc import library
from ..beam_topk import check
from ..dispatch import Implementation, Operator, Support
from .ascendc import NAME, cores_of

#: The types of logits, as entries are named.
DTYPES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}

#: Workspace of a row: the best records of up to 64 parts (``kernels/beam_topk.cpp``).
_ROW_BYTES = 8192


@dataclass(frozen=True, slots=True)
class BeamRequest:
    """What an implementation must know of a call: the type of the logits, None without them."""

    logits: torch.dtype | None


def entry(logits: torch.dtype | None) -> str:
    """Return the name of the kernel."""
    if logits is None:
        return "beam_topk_quantised"
    return f"beam_topk_exact_{DTYPES.get(logits, str(logits))}"


def supports(request: BeamRequest) -> Support:
    """Say whether the kernel serves a call, and why."""
    return library.support(entry(request.logits))


operator: Operator[BeamRequest] = Operator("beam_topk (npu)", (Implementation(NAME, supports),))


def beam_topk(
    codes: torch.Tensor, scales: torch.Tensor, k: int, logits: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return the best tokens of each row; arguments, results, errors: :mod:`ops.beam_topk`."""
    check(codes, scales, k, logits)
    name = entry(None if logits is None else logits.dtype)
    operator.choose(BeamRequest(None if logits is None else logits.dtype))
    rows, vocab = codes.shape
    shape, device = (rows, k), codes.device
    indices = torch.empty(shape, dtype=torch.int32, device=device)
    scores, log_probs = (torch.empty(shape, device=device) for _ in range(2))
    if rows:
        # All cores wait for each other once, so none may be beyond what the device has.
        cores = cores_of(device).vector
        workspace = torch.empty(rows * _ROW_BYTES, dtype=torch.uint8, device=device)
        strides = [codes.stride(0), 0 if logits is None else logits.stride(0)]
        tensors = (codes, scales, logits, indices, scores, log_probs, workspace)
        torch.ops.ascend_plugin_launch.beam_topk(name, cores, *tensors, [rows, vocab, k, *strides])
    return indices, scores, log_probs
