"""Typed calls into the native kernels: tensors to C structs, status codes to exceptions.

The operators have checked every shape, dtype and stride before they come here; only what the
kernels find out themselves (block ids and slots) is answered here.
"""

from __future__ import annotations

import torch

from ..page_layout import PageLayout
from .abi import Dtype, Status, pack_attention_args, pack_write_args
from .loader import NativeLibrary

#: Torch dtypes the kernels take, and their codes in the C ABI.
DTYPES: dict[torch.dtype, int] = {
    torch.float32: int(Dtype.FLOAT32),
    torch.float16: int(Dtype.FLOAT16),
    torch.bfloat16: int(Dtype.BFLOAT16),
}


def _page_fields(pages: torch.Tensor, layout: PageLayout) -> tuple[int, ...]:
    """Fields of ``ascend_pages``, in order."""
    block_stride, head_stride, _, _ = pages.stride()
    itemsize = pages.itemsize
    return (
        pages.data_ptr(),
        pages.shape[0],
        block_stride * itemsize,
        head_stride * itemsize,
        layout.k_offset,
        layout.v_offset,
        DTYPES[pages.dtype],
        layout.block_size,
        pages.shape[1],
        layout.head_dim,
    )


def _address(tensor: torch.Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def paged_attention(
    lib: NativeLibrary,
    query: torch.Tensor,
    pages: torch.Tensor,
    out: torch.Tensor,
    query_start_loc: torch.Tensor,
    seq_lens: torch.Tensor,
    block_table: torch.Tensor,
    layout: PageLayout,
    *,
    scale: float,
    causal: bool,
    window: int,
    soft_cap: float,
    alibi_slopes: torch.Tensor | None,
    sinks: torch.Tensor | None,
    num_threads: int,
) -> None:
    """Call ``ascend_cpu_paged_attention``; arguments as in ``ops.paged_attention``.

    Args:
        lib: loaded kernels.
        query: as in the operator, like every argument not named here.
        num_threads: OpenMP threads.

    Raises:
        ValueError: a block id outside the pages; nothing was written.
    """
    q_token, q_head, _ = query.stride()
    out_token, out_head, _ = out.stride()
    args = pack_attention_args(
        *_page_fields(pages, layout),
        query.data_ptr(),
        out.data_ptr(),
        q_token,
        q_head,
        out_token,
        out_head,
        query_start_loc.data_ptr(),
        seq_lens.data_ptr(),
        block_table.data_ptr(),
        block_table.stride(0),
        _address(alibi_slopes),
        _address(sinks),
        scale,
        soft_cap,
        window,
        causal,
        DTYPES[query.dtype],
        query.shape[1],
        seq_lens.shape[0],
        num_threads,
    )
    status = lib.attention(args)
    if status == Status.BAD_BLOCK_ID:
        raise ValueError(
            f"block_table names a block outside the pages, which hold {pages.shape[0]} blocks; it "
            "must belong to this KV cache and cover seq_lens."
        )
    _expect_ok(status, layout)


def kv_write(
    lib: NativeLibrary,
    key: torch.Tensor,
    value: torch.Tensor,
    pages: torch.Tensor,
    slot_mapping: torch.Tensor,
    layout: PageLayout,
    *,
    num_threads: int,
) -> None:
    """Call ``ascend_cpu_kv_write``; arguments as in ``ops.kv_cache_write``.

    Args:
        lib: loaded kernels.
        key: as in the operator, like every argument not named here.
        num_threads: OpenMP threads.

    Raises:
        ValueError: a slot outside the pages; nothing was written.
    """
    key_token, key_head, _ = key.stride()
    value_token, value_head, _ = value.stride()
    args = pack_write_args(
        *_page_fields(pages, layout),
        key.data_ptr(),
        value.data_ptr(),
        key_token,
        key_head,
        value_token,
        value_head,
        slot_mapping.data_ptr(),
        slot_mapping.shape[0],
        DTYPES[key.dtype],
        num_threads,
    )
    status = lib.write(args)
    if status == Status.BAD_SLOT:
        raise ValueError(
            f"slot {int(slot_mapping.max())} lies outside the pages, which hold "
            f"{pages.shape[0] * layout.block_size}; slot_mapping must belong to this KV cache."
        )
    _expect_ok(status, layout)


def _expect_ok(status: int, layout: PageLayout) -> None:
    if status != Status.OK:
        raise RuntimeError(
            f"the native kernels refuse {layout} (status {status}), which the operator's checks "
            "let through; please report this, and set ops.implementation to 'reference' meanwhile."
        )
