"""The plugin's operators for the dispatch key of NPUs; importing this registers them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import cache, lru_cache
from itertools import pairwise
from typing import Any

import torch

from .. import beam_topk as _beam_schema  # noqa: F401  defines the operator
from .. import checks, latent
from .. import kv_cache_write as _write_schema  # noqa: F401
from .. import paged_attention as _attention_schema  # noqa: F401
from ..kv_cache_gather import GatherRequest, check_rows, check_sequences
from ..library import implement
from ..mla_attention import check_counts as check_query_counts
from ..mla_attention import check_rows as check_query_rows
from ..mla_cache_write import check_counts, check_tokens
from ..page_layout import LatentPlaneLayout, PatchCode, PlaneLayout, Quantisation
from . import (
    ascendc,
    attention,
    beam,
    elementwise,
    gather,
    hadamard,
    linear,
    mla,
    paths,
    quantised_linear,
    write,
)
from .ascendc import DeviceBatch, Int8Layer
from .latent_planes import page_latents
from .planes import page_planes, plane_blocks

#: The dispatch key of devices out of torch's tree, which torch_npu takes.
_DISPATCH_KEY = "PrivateUse1"


def kv_cache_write(
    key: torch.Tensor,
    value: torch.Tensor,
    pages: torch.Tensor,
    slot_mapping: torch.Tensor,
    layout: Sequence[int],
    channel_scales: torch.Tensor | None = None,
    patch_thresholds: Sequence[float] = (),
    counters: torch.Tensor | None = None,
) -> None:
    """Write K and V of new tokens into pages arranged by planes.

    Arguments and errors as in :func:`ops.kv_cache_write.kv_cache_write`, except: ``layout`` is a
    :class:`PlaneLayout`; ``counters`` are int64 ``[vector cores, 4]`` on the device, a row per
    core, and only the AscendC kernel counts; without it block 0 of C8D pages must not be a
    sequence's (vLLM keeps it for padding).
    """
    told = checks.plane_layout(layout)
    quantisation = Quantisation(told.quantisation)
    _check_tokens(key, value, told)
    checks.check_integer("slot_mapping", slot_mapping, torch.int64, 1)
    checks.check_channel_scales(channel_scales, quantisation, told.num_kv_heads, told.head_dim)
    checks.check_patch_thresholds(patch_thresholds, quantisation)
    checks.check_threshold_values(patch_thresholds)
    tokens = slot_mapping.shape[0]
    if tokens > key.shape[0]:
        raise ValueError(f"slot_mapping names {tokens} tokens, key has {key.shape[0]}.")
    planes = page_planes(pages, told)
    scales = _scales(channel_scales, quantisation, key.device)
    if tokens:
        layer = _layer(told, channel_scales, key.device)
        if patch_thresholds or counters is not None:
            thresholds = tuple(patch_thresholds) or layer.patch_thresholds
            layer = replace(layer, patch_thresholds=thresholds, counters=counters)
        write.write(key[:tokens], value[:tokens], planes, write.Slots(slot_mapping), layer, scales)


def paged_attention(
    query: torch.Tensor,
    pages: torch.Tensor,
    out: torch.Tensor,
    query_start_loc: torch.Tensor,
    seq_lens: torch.Tensor,
    block_table: torch.Tensor,
    layout: Sequence[int],
    scale: float,
    causal: bool = True,
    window: int = 0,
    soft_cap: float = 0.0,
    alibi_slopes: torch.Tensor | None = None,
    sinks: torch.Tensor | None = None,
    channel_scales: torch.Tensor | None = None,
    fast: bool = False,
) -> None:
    """Attend a ragged batch of queries to pages arranged by planes, into ``out``.

    Arguments and errors as in :func:`ops.paged_attention.paged_attention`, except: ``layout`` is a
    :class:`PlaneLayout`; ``query_start_loc`` and ``seq_lens`` had better be on the host, where the
    fused operator wants them (on the device they cost a synchronisation); ``fast`` changes nothing.
    """
    told = checks.plane_layout(layout)
    quantisation = Quantisation(told.quantisation)
    checks.check_tokens("query", query, told.head_dim)
    checks.check_tokens("out", out, told.head_dim)
    checks.check_channel_scales(channel_scales, quantisation, told.num_kv_heads, told.head_dim)
    batch = _batch(query_start_loc, seq_lens, block_table, plane_blocks(block_table), causal)
    tokens = batch.query_ends[-1] if batch.query_ends else 0
    if tokens == 0:
        return
    head = _head(query, told, channel_scales, scale, window)
    request = attention.FusedRequest(
        query.dtype,
        quantisation,
        query.shape[1],
        told.num_kv_heads,
        told.head_dim,
        told.block_size,
        batch.uniform,
        batch.max_query,
        window=bool(window),
        soft_cap=bool(soft_cap),
        alibi=alibi_slopes is not None,
        sinks=sinks is not None,
    )
    path = attention.operator.choose(request).implementation.name
    paths.attend(path, query[:tokens], page_planes(pages, told), batch, head, out[:tokens])


def kv_cache_gather(
    pages: torch.Tensor,
    block_table: torch.Tensor,
    seq_lens: torch.Tensor,
    starts: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    layout: Sequence[int],
    channel_scales: torch.Tensor | None = None,
) -> None:
    """Copy K and V of whole sequences out of int8 planes, dequantised.

    Arguments and errors as in :func:`ops.kv_cache_gather.kv_cache_gather`, except: ``layout`` is a
    :class:`PlaneLayout` of int8 pages; ``key`` and ``value`` are bfloat16 or float16; lengths, rows
    and ids of blocks stay on the device and are not checked, so they had better be right.
    """
    told = checks.plane_layout(layout)
    quantisation = Quantisation(told.quantisation)
    check_rows(key, value, told.num_kv_heads, told.head_dim)
    check_sequences(block_table, seq_lens, starts)
    checks.check_channel_scales(channel_scales, quantisation, told.num_kv_heads, told.head_dim)
    gather.operator.choose(
        GatherRequest(
            key.dtype,
            pages.dtype,
            told.num_kv_heads,
            told.head_dim,
            told.block_size,
            quantisation,
        )
    )
    # Query rows do not matter to a gather.
    batch = DeviceBatch(block_table, seq_lens, seq_lens, 0)
    layer = _layer(told, channel_scales, key.device)
    ascendc.gather(page_planes(pages, told), batch, starts, layer, (key, value))


def mla_cache_write(
    latents: torch.Tensor,
    rotary: torch.Tensor,
    pages: torch.Tensor,
    slot_mapping: torch.Tensor,
    layout: Sequence[int],
    channel_scales: torch.Tensor | None = None,
    counters: torch.Tensor | None = None,
) -> None:
    """Write latents and rotary parts of new tokens into pages arranged by planes.

    Arguments and errors as in :func:`ops.mla_cache_write.mla_cache_write`, except: ``layout`` is a
    :class:`LatentPlaneLayout`; nothing is counted; block 0 of C8D pages must not be a sequence's
    (vLLM keeps it for padding).
    """
    told = latent.latent_plane_layout(layout)
    check_tokens(latents, rotary, slot_mapping, told.latent_dim, told.rotary_dim)
    check_counts(latents, rotary, slot_mapping)
    latent.check_channel_scales(channel_scales, told)
    planes = page_latents(pages, told)
    tokens = slot_mapping.shape[0]
    mla.write_operator.choose(_latent_request(latents, pages, told))
    if tokens:
        layer = _latent_layer(told, channel_scales, latents.device)
        mla.write(latents[:tokens], rotary[:tokens], planes, slot_mapping, layer)


def mla_attention(
    query: torch.Tensor,
    query_rotary: torch.Tensor,
    pages: torch.Tensor,
    out: torch.Tensor,
    query_start_loc: torch.Tensor,
    seq_lens: torch.Tensor,
    block_table: torch.Tensor,
    layout: Sequence[int],
    scale: float,
    causal: bool = True,
    channel_scales: torch.Tensor | None = None,
    fast: bool = False,
) -> None:
    """Attend a ragged batch of queries to latents arranged by planes, into ``out``.

    Arguments and errors as in :func:`ops.mla_attention.mla_attention`, except: ``layout`` is a
    :class:`LatentPlaneLayout`; ``query_start_loc`` and ``seq_lens`` had better be on the host;
    ``fast`` changes nothing.
    """
    told = latent.latent_plane_layout(layout)
    check_query_rows(query, query_rotary, out, told.latent_dim, told.rotary_dim)
    check_query_counts(query, query_rotary)
    latent.check_channel_scales(channel_scales, told)
    planes = page_latents(pages, told)
    batch = _batch(query_start_loc, seq_lens, block_table, block_table, causal)
    mla.attention_operator.choose(_latent_request(query, pages, told, query.shape[1]))
    tokens = batch.query_ends[-1] if batch.query_ends else 0
    if tokens == 0:
        return
    layer = _latent_layer(told, channel_scales, query.device)
    head = mla.LatentHead(query.shape[1], float(scale), layer)
    mla.attend(query[:tokens], query_rotary[:tokens], planes, batch, head, out[:tokens])


def _latent_request(
    rows: torch.Tensor, pages: torch.Tensor, layout: LatentPlaneLayout, heads: int = 1
) -> mla.LatentRequest:
    return mla.LatentRequest(
        rows.dtype,
        pages.dtype,
        Quantisation(layout.quantisation),
        layout.latent_dim,
        layout.rotary_dim,
        layout.block_size,
        heads,
    )


def _check_tokens(key: torch.Tensor, value: torch.Tensor, layout: PlaneLayout) -> None:
    checks.check_tokens("key", key, layout.head_dim)
    if key.shape != value.shape or key.dtype != value.dtype:
        raise ValueError(
            f"key ({list(key.shape)}, {key.dtype}) and value ({list(value.shape)}, {value.dtype}) "
            "must have the same shape and dtype."
        )
    if key.shape[1] != layout.num_kv_heads:
        raise ValueError(f"key has {key.shape[1]} kv heads, pages have {layout.num_kv_heads}.")


def _batch(
    query_start_loc: torch.Tensor,
    seq_lens: torch.Tensor,
    block_table: torch.Tensor,
    blocks: torch.Tensor,
    causal: bool,
) -> attention.Batch:
    """Return a batch; ``blocks`` is its block table in the form that the fused operator takes."""
    checks.check_integer("query_start_loc", query_start_loc, torch.int32, 1)
    checks.check_integer("seq_lens", seq_lens, torch.int32, 1)
    checks.check_integer("block_table", block_table, torch.int32, 2)
    starts = query_start_loc.tolist()
    if len(starts) != seq_lens.shape[0] + 1 or block_table.shape[0] != seq_lens.shape[0]:
        raise ValueError(
            f"{seq_lens.shape[0]} seq_lens need one query_start_loc more and as many rows of "
            f"block_table, got {len(starts)} and {block_table.shape[0]}."
        )
    rows = [stop - start for start, stop in pairwise(starts)]
    device = DeviceBatch(
        block_table,
        query_start_loc.to(block_table.device),
        seq_lens.to(block_table.device),
        max(rows, default=0),
        causal,
    )
    return attention.Batch(
        starts[1:],
        seq_lens.tolist(),
        blocks,
        attention.uniform_rows(rows),
        causal,
        device,
    )


@lru_cache(maxsize=256)  # layers of a model; a cache without bounds would keep every tensor
def _scales(
    channel_scales: torch.Tensor | None, quantisation: Quantisation, device: torch.device
) -> write.ChannelScales | None:
    """Return C8S's scales as operators of torch_npu take them; by identity: they do not change."""
    if quantisation is not Quantisation.C8S or channel_scales is None:
        return None
    return write.ChannelScales.of(channel_scales, device)


@lru_cache(maxsize=256)
def _layer(
    layout: PlaneLayout, channel_scales: torch.Tensor | None, device: torch.device
) -> Int8Layer:
    """Return what kernels must know of a layer; by identity of its scales, as above."""
    quantisation = Quantisation(layout.quantisation)
    if channel_scales is not None:
        channel_scales = write.kernel_scales(channel_scales, quantisation).to(device)
    return Int8Layer(quantisation, channel_scales, PatchCode(layout.patch_code))


def _head(
    query: torch.Tensor,
    layout: PlaneLayout,
    channel_scales: torch.Tensor | None,
    scale: float,
    window: int,
) -> attention.Head:
    """Return the constants of a layer's attention."""
    quantisation = Quantisation(layout.quantisation)
    scales = _scales(channel_scales, quantisation, query.device)
    layer = _layer(layout, channel_scales, query.device)
    return attention.Head(query.shape[1], float(scale), window, quantisation, scales, layer)


@lru_cache(maxsize=256)
def _latent_layer(
    layout: LatentPlaneLayout, channel_scales: torch.Tensor | None, device: torch.device
) -> mla.LatentLayer:
    """Return what pages of latents hold; by identity of the layer's scales, as above."""
    return mla.LatentLayer.of(Quantisation(layout.quantisation), channel_scales, device)


def register() -> None:
    """Register the operators; a second call does nothing."""
    _register()


@cache
def _register() -> None:
    kernels: dict[str, Any] = {
        "kv_cache_write": kv_cache_write,
        "paged_attention": paged_attention,
        "kv_cache_gather": kv_cache_gather,
        "mla_cache_write": mla_cache_write,
        "mla_attention": mla_attention,
        "beam_topk": beam.beam_topk,
        "hadamard": hadamard.hadamard,
        "add_rms_norm": elementwise.add_rms_norm_in_place,
        "dense_matmul": linear.dense_matmul,
        **quantised_linear.KERNELS,
    }
    for name, kernel in kernels.items():
        implement(name, kernel, _DISPATCH_KEY)


register()
