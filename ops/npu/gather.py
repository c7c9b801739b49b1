"""Attention over int8 planes that the fused operator cannot read: dequantise them first.

The pages of the batch are gathered, turned into 16-bit keys and values and attended to without
pages. That moves three times the bytes and takes about ten launches more, but no constraint on
heads, blocks or query tokens is left. Prefill and ragged batches of int8 caches always go this way.
"""

from __future__ import annotations

from typing import Any

import torch
import torch_npu

from ..page_layout import Quantisation
from .attention import Batch, Head, masking
from .hadamard import rotate
from .planes import Planes

#: The name of this implementation in the choice.
NAME = "npu-gather"


def attend(
    query: torch.Tensor, planes: Planes, batch: Batch, head: Head, out: torch.Tensor
) -> None:
    """Attend ``query [tokens, heads, head_dim]`` to int8 planes, into ``out``."""
    _, kv_heads, _, block_size, _ = planes.key.shape
    index = _tokens(batch, block_size)
    key, value = (
        _dequantise(which, planes, batch, head, query.dtype).index_select(0, index)
        for which in range(2)
    )
    if head.quantisation is Quantisation.C8D:
        # Keys stay turned: turning the queries is less work. The factor is the transform's square.
        query = rotate(query)
    options: dict[str, Any] = {
        "input_layout": "TND",
        "num_heads": head.num_heads,
        "num_key_value_heads": kv_heads,
        "scale": head.scale_of(query.shape[-1]),
        "actual_seq_lengths": batch.query_ends,
        "actual_seq_lengths_kv": _ends(batch.seq_lens),
    }
    options |= masking(query.device, batch.causal, head.window)
    found, _ = torch_npu.npu_fused_infer_attention_score(query.contiguous(), key, value, **options)
    out.copy_(found.view(out.shape))


def _ends(lengths: list[int]) -> list[int]:
    ends, total = [], 0
    for length in lengths:
        total += length
        ends.append(total)
    return ends


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
