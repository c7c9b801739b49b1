"""Write K and V of new tokens into NZ pages."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from .. import checks
from ..dispatch import Implementation, Operator
from ..library import needs_dispatcher, register
from ..page_layout import PageLayout
from . import native, reference

SCHEMA = (
    "kv_cache_write(Tensor key, Tensor value, Tensor(a!) pages, Tensor slot_mapping, "
    "int[] layout) -> ()"
)


@dataclass(frozen=True, slots=True)
class WriteRequest:
    """What an implementation must know of a call to say whether it can serve it."""

    dtype: torch.dtype
    page_dtype: torch.dtype
    num_kv_heads: int
    head_dim: int
    block_size: int


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
) -> None:
    """Write K and V of new tokens into NZ pages, in place.

    Element ``(t, h, d)`` of ``key`` goes to block ``slot // block_size``, head ``h``, NZ position
    ``(d // C0, slot % block_size, d % C0)`` of the K plane, with ``slot = slot_mapping[t]`` and
    ``C0 = 32 / itemsize`` of the page; likewise ``value``. Values are rounded to nearest even when
    the page's type is narrower.

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

    Raises:
        ValueError: a shape, dtype, stride or slot is not as above.
    """
    call = torch.ops.ascend_plugin.kv_cache_write if needs_dispatcher(pages) else _cpu
    call(key, value, pages, slot_mapping, layout)


def _cpu(
    key: torch.Tensor,
    value: torch.Tensor,
    pages: torch.Tensor,
    slot_mapping: torch.Tensor,
    layout: Sequence[int],
) -> None:
    signature = (
        tuple(layout),
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
    )
    bound = operator.bound(signature)
    if bound is None:
        page_layout = checks.page_layout(layout)
        _check(key, value, pages, slot_mapping, page_layout)
        request = WriteRequest(
            key.dtype, pages.dtype, pages.shape[1], page_layout.head_dim, page_layout.block_size
        )
        bound = operator.bind(signature, request, pages, page_layout)
    tokens = slot_mapping.shape[0]
    if key.shape[0] != value.shape[0]:
        raise _differ(key, value)
    if tokens > key.shape[0]:
        raise ValueError(f"slot_mapping names {tokens} tokens, key has {key.shape[0]}.")
    if tokens:
        bound.run(key, value, pages, slot_mapping)


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


def _fake(
    key: torch.Tensor,
    value: torch.Tensor,
    pages: torch.Tensor,
    slot_mapping: torch.Tensor,
    layout: list[int],
) -> None:
    return None


register(SCHEMA, cpu=_cpu, fake=_fake)
