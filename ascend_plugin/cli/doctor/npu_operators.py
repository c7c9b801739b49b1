"""Which operators of torch_npu serve what models ask for, and what the NPU refuses."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from ascend_plugin.cli.doctor.check import Check, ok

if TYPE_CHECKING:
    from ascend_plugin.ops.dispatch import Choice, Operator

#: Kv heads, head dimension and block size of usual models.
_KV_HEADS, _HEAD_DIM, _BLOCK_SIZE = 8, 128, 128

#: Query heads of a usual model (Qwen3-8B), and of one that the fused attention lists for int8 pages
#: (Qwen3-32B).
_HEADS, _LISTED_HEADS = 32, 64

#: Query heads of DeepSeek-V2-Lite.
_LATENT_HEADS = 16

#: Query tokens of every sequence; 0: they differ, or are many.
_PHASES = {"decode": 1, "prefill": 0}

#: Operators without a choice, by what they do.
_FIXED = {
    "RMS norm": ("npu_rms_norm",),
    "add and RMS norm": ("npu_add_rms_norm",),
    "SwiGLU": ("npu_swiglu",),
    "rotary embedding": ("npu_mrope",),
    "weights in NZ order": ("npu_format_cast",),
    "int8 weights and inputs": ("npu_quantize", "npu_dynamic_quant", "npu_quant_matmul"),
    "int8 and int4 weights": ("npu_weight_quant_batchmatmul",),
    "mixture of experts": (
        "npu_moe_init_routing_v2",
        "npu_grouped_matmul",
        "npu_moe_token_unpermute",
    ),
}


def check_npu_operators() -> list[Check]:
    """Ask the operators of the NPU for their choices, as an engine does when it starts."""
    from ascend_plugin.ops.dispatch import UnsupportedRequestError

    try:
        requests = list(_requests())
    except Exception as error:  # whatever torch_npu raises when it is imported
        detail = f"cannot be imported: {error}"
        return [Check("NPU operators", "problem", detail, "Repair torch_npu and CANN first.")]
    rows = []
    for label, operator, request in requests:
        try:
            rows.append(_row(label, operator.choose(request)))
        except UnsupportedRequestError:
            rows.append(_refusal(label, operator, request))
    return rows + _check_fixed()


def _requests() -> Iterator[tuple[str, Any, Any]]:
    """Yield label, operator and request."""
    import torch

    from ascend_plugin.ops import latent, npu_latents
    from ascend_plugin.ops.npu import attention, mla, write
    from ascend_plugin.ops.page_layout import Quantisation

    variants = [("bf16", torch.bfloat16, Quantisation.NONE)]
    variants.append(("fp16", torch.float16, Quantisation.NONE))
    for each in Quantisation:
        if each is not Quantisation.NONE:
            variants.append((each.name.lower(), torch.bfloat16, each))
    pages = (_KV_HEADS, _HEAD_DIM, _BLOCK_SIZE)
    for name, dtype, kind in variants:
        for heads in (_HEADS,) if kind is Quantisation.NONE else (_HEADS, _LISTED_HEADS):
            for phase, tokens in _PHASES.items():
                label = f"NPU operator paged_attention, {name} pages, {heads} heads, {phase}"
                shape = (dtype, kind, heads, *pages)
                asked = attention.FusedRequest(*shape, uniform=tokens, max_query=tokens)
                yield label, attention.operator, asked
    for name, dtype, kind in variants:
        stored = dtype if kind is Quantisation.NONE else torch.int8
        label = f"NPU operator kv_cache_write, {name} pages"
        # Values are a slice of the joint projection.
        request = write.PlaneWriteRequest(dtype, stored, *pages, kind, contiguous=False)
        yield label, write.operator, request
    latents = (npu_latents.LATENT_DIM, npu_latents.ROTARY_DIM, _BLOCK_SIZE)
    for name, dtype, kind in variants:
        if kind in latent.QUANTISATIONS:
            stored = dtype if kind is Quantisation.NONE else torch.int8
            for operator, heads in (
                (mla.attention_operator, _LATENT_HEADS),
                (mla.write_operator, 1),
            ):
                label = f"NPU operator {operator.name.split()[0]}, {name} pages"
                yield label, operator, mla.LatentRequest(dtype, stored, kind, *latents, heads)


def _row(label: str, choice: Choice[Any]) -> Check:
    rejected = "".join(f"; not {name}: {reason}" for name, reason in choice.rejected)
    return ok(label, f"{choice.implementation.name}: {choice.reason}{rejected}")


def _refusal(label: str, operator: Operator[Any], request: Any) -> Check:
    each = operator.implementations
    reasons = "; ".join(f"not {one.name}: {one.supports(request).reason}" for one in each)
    remedy = "Serve another kind of KV cache, or set ASCEND_PLUGIN_DEVICE=cpu."
    return Check(label, "warning", f"refused: {reasons}", remedy)


def _check_fixed() -> list[Check]:
    """Look for the operators that have no other implementation."""
    torch_npu = importlib.import_module("torch_npu")
    rows = []
    for what, names in _FIXED.items():
        label = f"NPU operator {what}"
        missing = [name for name in names if not hasattr(torch_npu, name)]
        if missing:
            detail = f"torch_npu {torch_npu.__version__} lacks {', '.join(missing)}"
            rows.append(Check(label, "problem", detail, "Install the tested version of torch_npu."))
        else:
            rows.append(ok(label, f"{', '.join(names)} of torch_npu {torch_npu.__version__}"))
    return rows
