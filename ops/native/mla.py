"""Typed calls into the native kernels of multi-head latent attention, as in ``kernels.py``."""

from __future__ import annotations

from typing import NamedTuple

import torch

from ..page_layout import LatentLayout
from .abi import Status, pack_mla_args, pack_mla_write_args
from .kernels import DTYPES, address, bad_block_id, bad_slot, expect_ok
from .loader import NativeLibrary


class LatentFields(NamedTuple):
    """Fields of ``ascend_latent_pages`` after ``data``: the same for all pages of one signature."""

    num_blocks: int
    block_stride: int
    rotary_offset: int
    scales_offset: int
    dtype: int
    block_size: int
    latent_dim: int
    rotary_dim: int
    quantisation: int

    @classmethod
    def of(cls, pages: torch.Tensor, layout: LatentLayout) -> LatentFields:
        """Return the fields of ``pages``; strides in bytes."""
        return cls(
            num_blocks=pages.shape[0],
            block_stride=pages.stride(0) * pages.itemsize,
            rotary_offset=layout.rotary_offset,
            scales_offset=layout.scales_offset,
            dtype=DTYPES[pages.dtype],
            block_size=layout.block_size,
            latent_dim=layout.latent_dim,
            rotary_dim=layout.rotary_dim,
            quantisation=layout.quantisation,
        )


def mla_attention(
    lib: NativeLibrary,
    fields: LatentFields,
    query: torch.Tensor,
    query_rotary: torch.Tensor,
    pages: torch.Tensor,
    out: torch.Tensor,
    query_start_loc: torch.Tensor,
    seq_lens: torch.Tensor,
    block_table: torch.Tensor,
    *,
    scale: float,
    causal: bool,
    channel_scales: torch.Tensor | None = None,
    fast: bool = False,
) -> None:
    """Call ``ascend_cpu_mla_attention`` on torch's threads; arguments as in the operator.

    Args:
        lib: loaded kernels.
        fields: constants of the pages.
        query: as in the operator, like every argument not named here.

    Raises:
        ValueError: a block id outside the pages; nothing was written.
    """
    rows = (query.data_ptr(), query_rotary.data_ptr(), out.data_ptr())
    strides = (*query.stride()[:2], *query_rotary.stride()[:2], *out.stride()[:2])
    batch = (query_start_loc.data_ptr(), seq_lens.data_ptr())
    table = (block_table.data_ptr(), block_table.stride(0), address(channel_scales))
    numbers = (scale, causal, DTYPES[query.dtype], query.shape[1])
    sizes = (seq_lens.shape[0], torch.get_num_threads(), fast)
    args = pack_mla_args(
        pages.data_ptr(), *fields, *rows, *strides, *batch, *table, *numbers, *sizes
    )
    status = lib.mla_attention(args)
    if status == Status.BAD_BLOCK_ID:
        raise bad_block_id(fields.num_blocks)
    expect_ok(status, fields)


def mla_write(
    lib: NativeLibrary,
    fields: LatentFields,
    latents: torch.Tensor,
    rotary: torch.Tensor,
    pages: torch.Tensor,
    slot_mapping: torch.Tensor,
    *,
    channel_scales: torch.Tensor | None = None,
    counters: torch.Tensor | None = None,
) -> None:
    """Call ``ascend_cpu_mla_write`` on torch's threads; arguments as in the operator.

    Args:
        lib: loaded kernels.
        fields: constants of the pages.
        latents: as in the operator, like every argument not named here.

    Raises:
        ValueError: a slot outside the pages; nothing was written.
    """
    args = pack_mla_write_args(
        pages.data_ptr(),
        *fields,
        latents.data_ptr(),
        rotary.data_ptr(),
        latents.stride(0),
        rotary.stride(0),
        slot_mapping.data_ptr(),
        address(channel_scales),
        address(counters),
        slot_mapping.shape[0],
        DTYPES[latents.dtype],
        torch.get_num_threads(),
    )
    status = lib.mla_write(args)
    if status == Status.BAD_SLOT:
        raise bad_slot(slot_mapping, fields.num_blocks * fields.block_size)
    expect_ok(status, fields)
