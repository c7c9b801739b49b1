"""Typed calls into the native kernels: tensors to C structs, status codes to exceptions.

The operators have checked every shape, dtype and stride before they come here; only what the
kernels find out themselves (block ids and slots) is answered here.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

from ..page_layout import PageLayout
from .abi import Dtype, Status, pack_attention_args, pack_write_args
from .loader import NativeLibrary

#: Torch dtypes the kernels take, and their codes in the C ABI.
DTYPES: dict[torch.dtype, int] = {
    torch.float32: int(Dtype.FLOAT32),
    torch.float16: int(Dtype.FLOAT16),
    torch.bfloat16: int(Dtype.BFLOAT16),
    torch.int8: int(Dtype.INT8),
}


class PageFields(NamedTuple):
    """Fields of ``ascend_pages`` after ``data``: the same for all pages of one signature."""

    num_blocks: int
    block_stride: int
    head_stride: int
    k_offset: int
    v_offset: int
    k_scales_offset: int
    v_scales_offset: int
    k_patches_offset: int
    v_patches_offset: int
    dtype: int
    block_size: int
    num_kv_heads: int
    head_dim: int
    quantisation: int
    patch_code: int
    patch_slots: int

    @classmethod
    def of(cls, pages: torch.Tensor, layout: PageLayout) -> PageFields:
        """Return the fields of ``pages``; strides in bytes."""
        block_stride, head_stride, _, _ = pages.stride()
        return cls(
            num_blocks=pages.shape[0],
            block_stride=block_stride * pages.itemsize,
            head_stride=head_stride * pages.itemsize,
            k_offset=layout.k_offset,
            v_offset=layout.v_offset,
            k_scales_offset=layout.k_scales_offset,
            v_scales_offset=layout.v_scales_offset,
            k_patches_offset=layout.k_patches_offset,
            v_patches_offset=layout.v_patches_offset,
            dtype=DTYPES[pages.dtype],
            block_size=layout.block_size,
            num_kv_heads=pages.shape[1],
            head_dim=layout.head_dim,
            quantisation=layout.quantisation,
            patch_code=layout.patch_code,
            patch_slots=layout.patch_slots,
        )


def address(tensor: torch.Tensor | None) -> int:
    """Return where a tensor's elements begin; 0 without one."""
    return 0 if tensor is None else tensor.data_ptr()


def refused(call: str, status: int) -> RuntimeError:
    """Return the error of a call that checks let through and kernels did not."""
    return RuntimeError(
        f"the native kernels refuse {call} (status {status}), which the operator's checks "
        "let through; please report this, and set ops.implementation to 'reference' meanwhile."
    )


def paged_attention(
    lib: NativeLibrary,
    fields: PageFields,
    query: torch.Tensor,
    pages: torch.Tensor,
    out: torch.Tensor,
    query_start_loc: torch.Tensor,
    seq_lens: torch.Tensor,
    block_table: torch.Tensor,
    *,
    scale: float,
    causal: bool,
    window: int,
    soft_cap: float,
    alibi_slopes: torch.Tensor | None,
    sinks: torch.Tensor | None,
    channel_scales: torch.Tensor | None = None,
    fast: bool = False,
) -> None:
    """Call ``ascend_cpu_paged_attention`` on torch's threads; arguments as in the operator.

    Args:
        lib: loaded kernels.
        fields: constants of the pages.
        query: as in the operator, like every argument not named here.

    Raises:
        ValueError: a block id outside the pages; nothing was written.
    """
    q_token, q_head, _ = query.stride()
    out_token, out_head, _ = out.stride()
    rows = (query.data_ptr(), out.data_ptr(), q_token, q_head, out_token, out_head)
    batch = (query_start_loc.data_ptr(), seq_lens.data_ptr())
    table = (block_table.data_ptr(), block_table.stride(0))
    optional = (address(alibi_slopes), address(sinks), address(channel_scales))
    scores = (scale, soft_cap, window, causal, DTYPES[query.dtype], query.shape[1])
    sizes = (seq_lens.shape[0], torch.get_num_threads(), fast)
    args = pack_attention_args(
        pages.data_ptr(), *fields, *rows, *batch, *table, *optional, *scores, *sizes
    )
    status = lib.attention(args)
    if status == Status.BAD_BLOCK_ID:
        raise bad_block_id(fields.num_blocks)
    expect_ok(status, fields)


def kv_write(
    lib: NativeLibrary,
    fields: PageFields,
    key: torch.Tensor,
    value: torch.Tensor,
    pages: torch.Tensor,
    slot_mapping: torch.Tensor,
    *,
    channel_scales: torch.Tensor | None = None,
    patch_thresholds: Sequence[float] = (),
    counters: torch.Tensor | None = None,
) -> None:
    """Call ``ascend_cpu_kv_write`` on torch's threads; arguments as in the operator.

    Args:
        lib: loaded kernels.
        fields: constants of the pages.
        key: as in the operator, like every argument not named here.

    Raises:
        ValueError: a slot outside the pages; nothing was written.
    """
    key_token, key_head, _ = key.stride()
    value_token, value_head, _ = value.stride()
    k_threshold, v_threshold = patch_thresholds or (0.0, 0.0)
    args = pack_write_args(
        pages.data_ptr(),
        *fields,
        key.data_ptr(),
        value.data_ptr(),
        key_token,
        key_head,
        value_token,
        value_head,
        slot_mapping.data_ptr(),
        address(channel_scales),
        address(counters),
        slot_mapping.shape[0],
        k_threshold,
        v_threshold,
        DTYPES[key.dtype],
        torch.get_num_threads(),
    )
    status = lib.write(args)
    if status == Status.BAD_SLOT:
        raise bad_slot(slot_mapping, fields.num_blocks * fields.block_size)
    expect_ok(status, fields)


def bad_block_id(num_blocks: int) -> ValueError:
    """Return the error of a block table that leaves the pages."""
    return ValueError(
        f"block_table names a block outside the pages, which hold {num_blocks} blocks; "
        "it must belong to this KV cache and cover seq_lens."
    )


def bad_slot(slot_mapping: torch.Tensor, slots: int) -> ValueError:
    """Return the error of slots beyond the pages."""
    return ValueError(
        f"slot {int(slot_mapping.max())} lies outside the pages, which hold {slots}; "
        "slot_mapping must belong to this KV cache."
    )


def expect_ok(status: int, fields: tuple[int, ...]) -> None:
    """Refuse a call that the kernels did not take.

    Raises:
        RuntimeError: they do not serve what the operator's checks let through.
    """
    if status != Status.OK:
        raise refused(str(fields), status)
