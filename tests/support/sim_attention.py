"""Batches for the fused attention operator, and attention in float64 to compare with."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from ascend_plugin.ops.nz import to_nz

_MASKS: dict[str, torch.Tensor] = {}


def causal_mask() -> torch.Tensor:
    """The triangle of 2048 x 2048 that sparse modes 2, 3 and 4 take."""
    if "causal" not in _MASKS:
        _MASKS["causal"] = torch.ones(2048, 2048, dtype=torch.int8).triu(1).npu()
    return _MASKS["causal"]


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@dataclass(frozen=True)
class Batch:
    """Requests with queries ``[N, Q_S, D]`` and keys and values ``[kv_heads, KV_S, D]``."""

    queries: list[torch.Tensor]
    keys: list[torch.Tensor]
    values: list[torch.Tensor]

    @property
    def scale(self) -> float:
        return float(self.queries[0].shape[-1] ** -0.5)

    @property
    def q_lengths(self) -> list[int]:
        return [q.shape[1] for q in self.queries]

    @property
    def kv_lengths(self) -> list[int]:
        return [k.shape[1] for k in self.keys]

    @property
    def cumulated(self) -> list[int]:
        return torch.tensor(self.q_lengths).cumsum(0).tolist()

    def flat(self, tensors: list[torch.Tensor]) -> torch.Tensor:
        """TND: ``[T, N, D]``."""
        return torch.cat([each.transpose(0, 1) for each in tensors]).contiguous()


def make_batch(
    lengths: list[tuple[int, int]],
    heads: int,
    kv_heads: int,
    head_dim: int,
    value_dim: int | None = None,
    dtype: torch.dtype = torch.bfloat16,
) -> Batch:
    """Make requests of (query tokens, keys)."""
    width = value_dim or head_dim
    batch = Batch([], [], [])
    for i, (tokens, keys) in enumerate(lengths):
        batch.queries.append(normal(heads, tokens, head_dim, seed=i, dtype=dtype))
        batch.keys.append(normal(kv_heads, keys, head_dim, seed=50 + i, dtype=dtype))
        batch.values.append(normal(kv_heads, keys, width, seed=90 + i, dtype=dtype))
    return batch


def reference(
    batch: Batch,
    *,
    causal: bool = False,
    window: int | None = None,
    sink: torch.Tensor | None = None,
) -> list[torch.Tensor]:
    """Attention of each request, float64 ``[N, Q_S, D]``, the last query at the last key."""
    results = []
    for query, key, value in zip(batch.queries, batch.keys, batch.values, strict=True):
        heads, tokens = query.shape[:2]
        keys, group = key.shape[1], heads // key.shape[0]
        if not keys:
            results.append(torch.zeros(heads, tokens, value.shape[-1], dtype=torch.float64))
            continue
        wide = key.double().repeat_interleave(group, 0)
        scores = query.double() @ wide.transpose(1, 2) * batch.scale
        distance = torch.arange(tokens)[:, None] + keys - tokens - torch.arange(keys)
        if causal:
            scores = scores.masked_fill(distance < 0, -torch.inf)
        if window is not None:
            scores = scores.masked_fill(distance > window, -torch.inf)
        if sink is not None:
            column = sink.double()[:, None, None].expand(heads, tokens, 1)
            scores = torch.cat((scores, column), -1)
        weights = scores.softmax(-1)[..., :keys].nan_to_num(0.0)
        results.append(weights @ value.double().repeat_interleave(group, 0))
    return results


@dataclass(frozen=True)
class Pages:
    """A paged cache of a batch on the NPU, and its block table; pages lie in shuffled order."""

    key: torch.Tensor
    value: torch.Tensor
    table: torch.Tensor


def paged(batch: Batch, block_size: int, arrangement: str) -> Pages:
    """Put keys and values into pages ``BnBsH``, ``BnNBsD`` or ``NZ``; unused slots are NaN."""
    counts = [-(-n // block_size) for n in batch.kv_lengths]
    total = sum(counts) + 2
    order = torch.randperm(total, generator=torch.Generator().manual_seed(3)).tolist()
    table = torch.zeros(len(counts), max(1, *counts), dtype=torch.int32)
    for request, count in enumerate(counts):
        table[request, :count] = torch.tensor([order.pop() for _ in range(count)])
    caches = []
    for tensors in (batch.keys, batch.values):
        heads, _, width = tensors[0].shape
        dtype = tensors[0].dtype
        cache = torch.full((total, heads, block_size, width), _poison(dtype), dtype=dtype)
        for request, rows in enumerate(tensors):
            for token in range(rows.shape[1]):
                block = int(table[request, token // block_size])
                cache[block, :, token % block_size] = rows[:, token]
        if arrangement == "NZ":
            cache = to_nz(cache)
        elif arrangement == "BnBsH":
            cache = cache.transpose(1, 2).flatten(2).contiguous()
        caches.append(cache.npu())
    return Pages(*caches, table.npu())


def _poison(dtype: torch.dtype) -> float:
    return torch.nan if dtype.is_floating_point else 99


def attend_pages(batch: Batch, pages: Pages, block_size: int, **options: Any) -> torch.Tensor:
    """Call the operator on a paged batch in layout TND; the result is ``[T, N, D]``."""
    import torch_npu

    arguments: dict[str, Any] = {
        "block_table": pages.table,
        "input_layout": "TND",
        "block_size": block_size,
        "actual_seq_lengths": batch.cumulated,
        "actual_seq_lengths_kv": batch.kv_lengths,
        "num_heads": batch.queries[0].shape[0],
        "num_key_value_heads": batch.keys[0].shape[0],
        "scale": batch.scale,
    }
    query = batch.flat(batch.queries).npu()
    result, _ = torch_npu.npu_fused_infer_attention_score(
        query, pages.key, pages.value, **{**arguments, **options}
    )
    return result
