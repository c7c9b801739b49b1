"""Attention over int8 planes that neither FIA nor a kernel reads: dequantise them first.

The context of the batch is gathered, turned into 16-bit keys and values and attended to without
pages. No constraint on heads, blocks or query tokens is left. Prefill of int8 caches always goes
this way. The AscendC kernel does it in one launch (:func:`attend_by_kernel`); without it operators
of torch_npu take about ten, and move three times the bytes (:func:`attend`).
"""

from __future__ import annotations

import itertools
from typing import Any

import torch
import torch_npu

from ..dispatch import Implementation, Operator, Support
from ..kv_cache_gather import GatherRequest
from ..page_layout import Quantisation
from . import ascendc
from .attention import Batch, Head, masking
from .hadamard import rotate
from .planes import Planes


def kernel_support(request: GatherRequest) -> Support:
    """Say whether the AscendC kernel copies sequences out of pages, and why."""
    if request.quantisation is Quantisation.NONE:
        return Support(False, "pages without quantisation, which the fused attention reads")
    return ascendc.support(
        "kv_cache_gather",
        request.quantisation,
        request.dtype,
        request.head_dim,
        request.block_size,
    )


operator: Operator[GatherRequest] = Operator(
    "kv_cache_gather (npu)",
    (Implementation(ascendc.NAME, kernel_support),),
)


def attend(
    query: torch.Tensor, planes: Planes, batch: Batch, head: Head, out: torch.Tensor
) -> None:
    """Attend ``query [tokens, heads, head_dim]`` to int8 planes, into ``out``."""
    block_size = planes.key.shape[3]
    index = _tokens(batch, block_size)
    key, value = (
        _dequantise(which, planes, batch, head, query.dtype).index_select(0, index)
        for which in range(2)
    )
    if head.quantisation is Quantisation.C8D:
        # Keys stay turned: turning the queries is less work. The factor is the transform's square.
        query = rotate(query)
    _attend_rows(query, key, value, batch, head, head.scale_of(query.shape[-1]), out)


def attend_by_kernel(
    query: torch.Tensor, planes: Planes, batch: Batch, head: Head, out: torch.Tensor
) -> None:
    """Attend ``query [tokens, heads, head_dim]`` to int8 planes, into ``out``: two launches."""
    assert batch.device is not None
    kv_heads, head_dim = planes.key.shape[1], query.shape[-1]
    shape = (2, sum(batch.seq_lens), kv_heads, head_dim)
    key, value = torch.empty(shape, dtype=query.dtype, device=query.device)
    ascendc.gather(planes, batch.device, batch.starts, head.layer, (key, value))
    _attend_rows(query, key, value, batch, head, head.scale, out)


def _attend_rows(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    batch: Batch,
    head: Head,
    scale: float,
    out: torch.Tensor,
) -> None:
    """Attend to the context of the sequences, one after the other, ``[tokens, kv_heads, dim]``."""
    options: dict[str, Any] = {
        "input_layout": "TND",
        "num_heads": head.num_heads,
        "num_key_value_heads": key.shape[1],
        "scale": scale,
        "actual_seq_lengths": batch.query_ends,
        "actual_seq_lengths_kv": _ends(batch.seq_lens),
    }
    options |= masking(query.device, batch.causal, head.window)
    found, _ = torch_npu.npu_fused_infer_attention_score(query.contiguous(), key, value, **options)
    out.copy_(found.view(out.shape))


def _ends(lengths: list[int]) -> list[int]:
    return list(itertools.accumulate(lengths))


def _tokens(batch: Batch, block_size: int) -> torch.Tensor:
    """Return where each token of context lies among the gathered blocks, on the device.

    Lengths are known on the host, so the numbers are made there and copied without waiting.
    """
    width = batch.blocks.shape[1] * block_size
    parts = [torch.arange(length) + row * width for row, length in enumerate(batch.seq_lens)]
    index = torch.cat(parts).to(torch.int32)
    return index.pin_memory().to(batch.blocks.device, non_blocking=True)


def _dequantise(
    which: int, planes: Planes, batch: Batch, head: Head, dtype: torch.dtype
) -> torch.Tensor:
    """Return K (0) or V (1) of all blocks of a batch, ``[tokens, kv_heads, head_dim]``."""
    plane = (planes.key, planes.value)[which]
    _, kv_heads, groups, _, c0 = plane.shape
    blocks = batch.blocks.flatten()
    codes = plane.index_select(0, blocks)  # [blocks, kv_heads, groups, size, c0]
    rows = codes.permute(0, 3, 1, 2, 4).reshape(-1, kv_heads, groups * c0).to(torch.float32)
    if head.quantisation is Quantisation.C8S:
        assert head.scales is not None
        channels = (head.scales.key, head.scales.value)[which]
        return (rows * channels.squeeze(1).to(torch.float32)).to(dtype)
    scales = (planes.key_scales, planes.value_scales)[which]
    assert scales is not None
    each = scales.index_select(0, blocks).transpose(1, 2).reshape(-1, kv_heads, 1)
    return (rows * each).to(dtype)
