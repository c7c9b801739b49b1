"""Write K and V of new tokens into NZ pages."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import torch

from .. import checks
from ..dispatch import Bound, Implementation, Operator
from ..library import needs_dispatcher, register
from ..page_layout import PageLayout, Quantisation
from . import native, reference

SCHEMA = (
    "kv_cache_write(Tensor key, Tensor value, Tensor(a!) pages, Tensor slot_mapping, "
    "int[] layout, Tensor? channel_scales=None, float[] patch_thresholds=[], "
    "Tensor(b!)? counters=None) -> ()"
)


@dataclass(frozen=True, slots=True)
class WriteRequest:
    """What an implementation must know of a call to say whether it can serve it."""

    dtype: torch.dtype
    page_dtype: torch.dtype
    num_kv_heads: int
    head_dim: int
    block_size: int
    quantisation: Quantisation = Quantisation.NONE


operator: Operator[WriteRequest] = Operator(
    "kv_cache_write",
    (
        Implementation("native", native.supports, native.bind),
        Implementation("reference", reference.supports, reference.bind),
    ),
)


def kv_cache_write(
    key: torch.Tensor,
    value: torch.Tensor,
    pages: torch.Tensor,
    slot_mapping: torch.Tensor,
    layout: Sequence[int],
    *,
    channel_scales: torch.Tensor | None = None,
    patch_thresholds: Sequence[float] = (),
    counters: torch.Tensor | None = None,
) -> None:
    """Write K and V of new tokens into NZ pages, in place.

    Element ``(t, h, d)`` of ``key`` goes to block ``slot // block_size``, head ``h``, NZ position
    ``(d // C0, slot % block_size, d % C0)`` of the K plane, with ``slot = slot_mapping[t]`` and
    ``C0 = 32 / itemsize`` of the page; likewise ``value``. Values are rounded to nearest even when
    the page's type is narrower.

    Int8 pages hold ``clamp(rint(x / scale), -127, 127)``. In C8D pages the scale is the largest
    absolute value of the row (a token and kv head, of K or of V) divided by 127; a row with a NaN
    or an infinity gets the scale NaN. In C8S and C8P pages the scale belongs to the channel: what
    lies beyond saturates, NaN becomes 0. In C8P pages a row whose relative error exceeds the
    threshold gets a patch, unless its slot (:class:`PageLayout`) holds that of an earlier token.
    The arithmetic is in ``ops/quantise.py``, to the bit.

    Args:
        key: ``[tokens, kv_heads, head_dim]``, float32, float16 or bfloat16, last dimension
            contiguous.
        value: the same shape and dtype as ``key``.
        pages: ``[blocks, kv_heads, block_size, content]``, written in place; the last two
            dimensions contiguous.
        slot_mapping: int64 ``[tokens]``; ``block * block_size + offset``, negative: the token is
            padding and is skipped. Slots are distinct. It may be shorter than ``key``, whose
            remaining tokens are padding.
        layout: a :class:`PageLayout`, from ``PageFormat.layout()``.
        channel_scales: C8S and C8P: float32 ``[2, kv_heads, head_dim]``, contiguous, K first,
            positive and finite; None otherwise.
        patch_thresholds: C8P: relative errors ``|x - x'| / |x|`` of K and of V, not negative;
            empty otherwise.
        counters: int64 ``[4]``, added to: rows written, rows that saturated (or had a NaN), rows
            that got a patch, rows that found no slot for one. Int8 pages only, others leave it.

    Raises:
        ValueError: a shape, dtype, stride or slot is not as above.
    """
    call = torch.ops.ascend_plugin.kv_cache_write if needs_dispatcher(pages) else _cpu
    call(key, value, pages, slot_mapping, layout, channel_scales, patch_thresholds, counters)


def _cpu(
    key: torch.Tensor,
    value: torch.Tensor,
    pages: torch.Tensor,
    slot_mapping: torch.Tensor,
    layout: Sequence[int],
    channel_scales: torch.Tensor | None = None,
    patch_thresholds: Sequence[float] = (),
    counters: torch.Tensor | None = None,
) -> None:
    signature = _signature(
        key, value, pages, slot_mapping, layout, channel_scales, patch_thresholds, counters
    )
    bound = operator.bound(signature)
    if bound is None:
        page_layout = checks.page_layout(layout)
        _check(key, value, pages, slot_mapping, page_layout)
        _check_quantised(page_layout, pages.shape[1], channel_scales, patch_thresholds, counters)
        bound = _bind(signature, key, pages, page_layout)
    tokens = slot_mapping.shape[0]
    if key.shape[0] != value.shape[0]:
        raise _differ(key, value)
    if tokens > key.shape[0]:
        raise ValueError(f"slot_mapping names {tokens} tokens, key has {key.shape[0]}.")
    if not tokens:
        return
    if not bound.layout.quantisation:
        bound.run(key, value, pages, slot_mapping)
        return
    checks.check_threshold_values(patch_thresholds)
    bound.run(
        key,
        value,
        pages,
        slot_mapping,
        channel_scales=channel_scales,
        patch_thresholds=patch_thresholds,
        counters=counters,
    )


def _signature(
    key: torch.Tensor,
    value: torch.Tensor,
    pages: torch.Tensor,
    slot_mapping: torch.Tensor,
    layout: Sequence[int],
    channel_scales: torch.Tensor | None,
    patch_thresholds: Sequence[float],
    counters: torch.Tensor | None,
) -> Hashable:
    """Return what checks and the choice depend on. It is flat: nested tuples hash slower."""
    return (
        layout if type(layout) is PageLayout else tuple(layout),
        pages.dtype,
        pages.shape,
        pages.stride(),
        key.dtype,
        key.shape[1:],
        key.stride()[2:],
        value.dtype,
        value.shape[1:],
        value.stride()[2:],
        slot_mapping.dtype,
        slot_mapping.dim(),
        slot_mapping.is_contiguous(),
        channel_scales is None or checks.kind(channel_scales),
        len(patch_thresholds),
        counters is None or checks.kind(counters),
    )


def _bind(signature: Hashable, key: torch.Tensor, pages: torch.Tensor, layout: PageLayout) -> Bound:
    request = WriteRequest(
        key.dtype,
        pages.dtype,
        pages.shape[1],
        layout.head_dim,
        layout.block_size,
        Quantisation(layout.quantisation),
    )
    return operator.bind(signature, request, pages, layout)


def _differ(key: torch.Tensor, value: torch.Tensor) -> ValueError:
    return ValueError(
        f"key ({list(key.shape)}, {key.dtype}) and value ({list(value.shape)}, {value.dtype}) "
        "must have the same shape and dtype."
    )


def _check(
    key: torch.Tensor,
    value: torch.Tensor,
    pages: torch.Tensor,
    slot_mapping: torch.Tensor,
    layout: PageLayout,
) -> None:
    checks.check_pages(pages, layout)
    checks.check_tokens("key", key, layout.head_dim)
    checks.check_tokens("value", value, layout.head_dim)
    checks.check_integer("slot_mapping", slot_mapping, torch.int64, 1)
    if key.shape[1:] != value.shape[1:] or key.dtype != value.dtype:
        raise _differ(key, value)
    if key.shape[1] != pages.shape[1]:
        raise ValueError(f"key has {key.shape[1]} kv heads, pages have {pages.shape[1]}.")


def _check_quantised(
    layout: PageLayout,
    kv_heads: int,
    channel_scales: torch.Tensor | None,
    patch_thresholds: Sequence[float],
    counters: torch.Tensor | None,
) -> None:
    quantisation = Quantisation(layout.quantisation)
    checks.check_channel_scales(channel_scales, quantisation, kv_heads, layout.head_dim)
    checks.check_patch_thresholds(patch_thresholds, quantisation)
    checks.check_counters(counters)


def _fake(
    key: torch.Tensor,
    value: torch.Tensor,
    pages: torch.Tensor,
    slot_mapping: torch.Tensor,
    layout: list[int],
    channel_scales: torch.Tensor | None = None,
    patch_thresholds: Sequence[float] = (),
    counters: torch.Tensor | None = None,
) -> None:
    return None


register(SCHEMA, cpu=_cpu, fake=_fake)
