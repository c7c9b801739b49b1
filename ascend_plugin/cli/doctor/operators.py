"""Which implementation each operator runs on, for requests that stand for what models send."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from ascend_plugin.cli.doctor.check import Check, ok

if TYPE_CHECKING:
    from ascend_plugin.ops.dispatch import Choice

#: Query heads, kv heads, head dimension and block size of a usual model.
_HEADS, _KV_HEADS, _HEAD_DIM, _BLOCK_SIZE = 32, 8, 128, 128


def check_operators() -> list[Check]:
    """Ask every operator for its choice, per element type of the cache."""
    from ascend_plugin.ops.dispatch import UnsupportedRequestError

    rows = []
    for name, operator, variant, request in _representative_requests():
        label = f"operator {name}, {variant} pages"
        try:
            rows.append(_row(label, operator.choose(request)))
        except (UnsupportedRequestError, ValueError) as error:
            remedy = "Run the tests of this operator, and check ASCEND_PLUGIN_OPS."
            rows.append(Check(label, "problem", str(error), remedy))
    return rows


def _representative_requests() -> Iterator[tuple[str, Any, str, Any]]:
    """Yield operator name, operator, variant and request."""
    import torch

    from ascend_plugin.ops import kv_cache_write, paged_attention
    from ascend_plugin.ops.page_layout import Quantisation

    none, int8 = Quantisation.NONE, torch.int8
    variants = [
        ("bf16", torch.bfloat16, torch.bfloat16, none),
        ("fp16", torch.float16, torch.float16, none),
        ("fp32", torch.float32, torch.float32, none),
    ]
    for quantisation in Quantisation:
        if quantisation is not none:
            variants.append((quantisation.name.lower(), torch.bfloat16, int8, quantisation))
    for variant, dtype, page_dtype, quantisation in variants:
        attention = paged_attention.AttentionRequest(
            dtype, page_dtype, _HEADS, _KV_HEADS, _HEAD_DIM, _BLOCK_SIZE, quantisation
        )
        yield "paged_attention", paged_attention.operator, variant, attention
    for variant, dtype, page_dtype, quantisation in variants:
        write = kv_cache_write.WriteRequest(
            dtype, page_dtype, _KV_HEADS, _HEAD_DIM, _BLOCK_SIZE, quantisation
        )
        yield "kv_cache_write", kv_cache_write.operator, variant, write


def _row(label: str, choice: Choice[Any]) -> Check:
    chosen = choice.implementation.name
    rejected = "".join(f"; not {name}: {reason}" for name, reason in choice.rejected)
    detail = f"{chosen}: {choice.reason}{rejected}"
    if chosen != "reference":
        return ok(label, detail)
    remedy = (
        "Plain torch is many times slower: see the rejected implementations, and unset "
        "ASCEND_PLUGIN_OPS unless a result is being checked."
    )
    return Check(label, "warning", detail, remedy)
