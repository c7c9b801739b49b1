"""Write latents and rotary parts of new tokens into pages (multi-head latent attention, MLA)."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import torch

from .. import checks, latent
from ..dispatch import Implementation, Operator
from ..library import needs_dispatcher, register
from ..page_layout import LatentLayout, Quantisation
from . import native, reference

SCHEMA = (
    "mla_cache_write(Tensor latents, Tensor rotary, Tensor(a!) pages, Tensor slot_mapping, "
    "int[] layout, Tensor? channel_scales=None, Tensor(b!)? counters=None) -> ()"
)


@dataclass(frozen=True, slots=True)
class LatentWriteRequest:
    """What an implementation must know of a call to say whether it can serve it."""

    dtype: torch.dtype
    page_dtype: torch.dtype
    latent_dim: int
    rotary_dim: int
    block_size: int
    quantisation: Quantisation = Quantisation.NONE


operator: Operator[LatentWriteRequest] = Operator(
    "mla_cache_write",
    (
        Implementation("native", native.supports, native.bind),
        Implementation("reference", reference.supports, reference.bind),
    ),
)


def mla_cache_write(
    latents: torch.Tensor,
    rotary: torch.Tensor,
    pages: torch.Tensor,
    slot_mapping: torch.Tensor,
    layout: Sequence[int],
    *,
    channel_scales: torch.Tensor | None = None,
    counters: torch.Tensor | None = None,
) -> None:
    """Write latents and rotary parts of new tokens into pages, in place.

    Element ``(t, d)`` goes to block ``slot // block_size``, NZ position ``(d // C0,
    slot % block_size, d % C0)`` of its array, with ``slot = slot_mapping[t]``. Values are rounded
    to nearest even when the page's type is narrower. Latents of int8 pages become
    ``clamp(rint(x / scale), -127, 127)``; the scale is the row's largest absolute value divided by
    127 (C8D; NaN if the row is not finite) or the channel's (C8S; NaN becomes 0). The arithmetic is
    in ``ops/quantise.py``, to the bit; rows are not rotated.

    Args:
        latents: ``[tokens, latent_dim]``, float32, float16 or bfloat16, last dimension contiguous:
            the normalised output of ``kv_a_proj``.
        rotary: ``[tokens, rotary_dim]`` of the same type, with the position applied.
        pages: ``[blocks, block_size, content]``, written in place; contiguous within a block.
        slot_mapping: int64 ``[tokens]``; negative: the token is padding and is skipped. Slots are
            distinct. It may be shorter than ``latents``, whose remaining tokens are padding.
        layout: a :class:`LatentLayout`, from ``LatentPageFormat.layout()``.
        channel_scales: C8S: float32 ``[latent_dim]``, positive and finite; None otherwise.
        counters: int64 ``[4]``, added to: rows written, rows that saturated (or had a NaN), and
            two that stay. Int8 pages only, others leave it.

    Raises:
        ValueError: a shape, dtype, stride or slot is not as above.
    """
    call = torch.ops.ascend_plugin.mla_cache_write if needs_dispatcher(pages) else _cpu
    call(latents, rotary, pages, slot_mapping, layout, channel_scales, counters)


def _cpu(
    latents: torch.Tensor,
    rotary: torch.Tensor,
    pages: torch.Tensor,
    slot_mapping: torch.Tensor,
    layout: Sequence[int],
    channel_scales: torch.Tensor | None = None,
    counters: torch.Tensor | None = None,
) -> None:
    signature = _signature(latents, rotary, pages, slot_mapping, layout, channel_scales, counters)
    bound = operator.bound(signature)
    if bound is None:
        page = latent.latent_layout(layout)
        latent.check_pages(pages, page)
        check_tokens(latents, rotary, slot_mapping, page.latent_dim, page.rotary_dim)
        latent.check_channel_scales(channel_scales, page)
        checks.check_counters(counters)
        request = LatentWriteRequest(
            latents.dtype,
            pages.dtype,
            page.latent_dim,
            page.rotary_dim,
            page.block_size,
            Quantisation(page.quantisation),
        )
        bound = operator.bind(signature, request, pages, page)
    check_counts(latents, rotary, slot_mapping)
    if slot_mapping.shape[0]:
        bound.run(
            latents,
            rotary,
            pages,
            slot_mapping,
            channel_scales=channel_scales,
            counters=counters,
        )


def _signature(
    latents: torch.Tensor,
    rotary: torch.Tensor,
    pages: torch.Tensor,
    slot_mapping: torch.Tensor,
    layout: Sequence[int],
    channel_scales: torch.Tensor | None,
    counters: torch.Tensor | None,
) -> Hashable:
    """Return what checks and the choice depend on. It is flat: nested tuples hash slower."""
    return (
        layout if type(layout) is LatentLayout else tuple(layout),
        pages.dtype,
        pages.shape,
        pages.stride(),
        latents.dtype,
        latents.shape[1:],
        latents.stride()[1:],
        rotary.dtype,
        rotary.shape[1:],
        rotary.stride()[1:],
        slot_mapping.dtype,
        slot_mapping.dim(),
        slot_mapping.is_contiguous(),
        channel_scales is None or checks.kind(channel_scales),
        counters is None or checks.kind(counters),
    )


def _differ(latents: torch.Tensor, rotary: torch.Tensor) -> ValueError:
    return ValueError(
        f"latents ({list(latents.shape)}, {latents.dtype}) and rotary ({list(rotary.shape)}, "
        f"{rotary.dtype}) must have the same number of tokens and dtype."
    )


def check_tokens(
    latents: torch.Tensor,
    rotary: torch.Tensor,
    slot_mapping: torch.Tensor,
    latent_dim: int,
    rotary_dim: int,
) -> None:
    """Refuse tokens that do not match the pages they go to, or each other.

    Raises:
        ValueError: a width, a type or an order in memory differs.
    """
    for name, rows, width in (("latents", latents, latent_dim), ("rotary", rotary, rotary_dim)):
        latent.check_rows(name, rows, [width], f"[tokens, {width}] (the page's dimension)")
    checks.check_integer("slot_mapping", slot_mapping, torch.int64, 1)
    if latents.dtype != rotary.dtype:
        raise _differ(latents, rotary)


def check_counts(latents: torch.Tensor, rotary: torch.Tensor, slot_mapping: torch.Tensor) -> None:
    """Refuse another number of rotary parts than of latents, or more slots than tokens.

    Raises:
        ValueError: they differ.
    """
    if latents.shape[0] != rotary.shape[0]:
        raise _differ(latents, rotary)
    tokens = slot_mapping.shape[0]
    if tokens > latents.shape[0]:
        raise ValueError(f"slot_mapping names {tokens} tokens, latents has {latents.shape[0]}.")


def _fake(
    latents: torch.Tensor,
    rotary: torch.Tensor,
    pages: torch.Tensor,
    slot_mapping: torch.Tensor,
    layout: list[int],
    channel_scales: torch.Tensor | None = None,
    counters: torch.Tensor | None = None,
) -> None:
    return None


register(SCHEMA, cpu=_cpu, fake=_fake)
