"""The fused infer attention operator.

Attention of a batch of requests over keys and values in pages or in one tensor, floats or int8.
Products and softmax are float32; the result is rounded once. Requests without keys, and queries
that no key remains for, give zeros.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch

from ..table import operator
from .attention_call import SIGNATURES, AttentionCall, split
from .attention_checks import check_call, check_shapes

#: Antiquantisation modes: what one scale serves.
_CHANNEL, _TOKEN, _HEAD, _TOKEN_HEAD, _PAGED_TOKEN, _PAGED_TOKEN_HEAD = range(6)

_LEFT_UP, _RIGHT_DOWN, _BAND = 2, 3, 4
_INVALID = -1

#: Elements of keys and values that are computed together.
_MAX_ELEMENTS = 1 << 25

Reader = Callable[[list[int], int], tuple[torch.Tensor, torch.Tensor]]


def _compute(version: int, *args: Any) -> None:
    call = AttentionCall.of(version, args)
    counts, kv_counts = call.query_lengths(), call.key_lengths()
    queries = split(call.query, call.layout, call.heads, counts)
    if call.query_rope is not None:
        ropes = split(call.query_rope, call.layout, call.heads, counts)
        queries = [torch.cat(pair, -1) for pair in zip(queries, ropes, strict=True)]
    outputs = split(call.out, call.out_layout, call.heads, counts)
    if sum(counts) * call.heads * call.out.shape[-1] < call.out.numel():
        call.out.zero_()  # rows of padding
    read: Reader = partial(_paged, call) if call.paged else _unpaged(call, kv_counts)
    sums: dict[int, torch.Tensor] = {}
    for group in _groups(call, counts, kv_counts):
        tokens = max(kv_counts[each] for each in group)
        if tokens <= 0:
            for each in group:
                outputs[each].zero_()
                sums[each] = torch.full(outputs[each].shape[:2], torch.inf)
            continue
        query = torch.stack([queries[each] for each in group])
        lengths = torch.tensor([kv_counts[each] for each in group])
        results, totals = _attend(call, group, query, *read(group, tokens), lengths)
        for index, each in enumerate(group):
            outputs[each].copy_(results[index])
            if totals is not None:
                sums[each] = totals[index]
    _write_lse(call, [sums[each] for each in sorted(sums)])


def _groups(call: AttentionCall, counts: list[int], kv_counts: list[int]) -> Iterator[list[int]]:
    """Yield requests that are computed together: as many queries each, and, unpaged, keys."""
    alike: dict[tuple[int, int], list[int]] = {}
    for request, (count, kv_count) in enumerate(zip(counts, kv_counts, strict=True)):
        if count:
            alike.setdefault((count, -1 if call.paged else kv_count), []).append(request)
    width = 2 * call.kv_heads * call.query.shape[-1]
    for group in alike.values():
        longest = max(1, *(kv_counts[each] for each in group))
        at_once = max(1, _MAX_ELEMENTS // (width * longest))
        for start in range(0, len(group), at_once):
            yield group[start : start + at_once]


def _attend(
    call: AttentionCall,
    group: list[int],
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    lengths: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Compute some requests.

    Args:
        call: the batch.
        group: their numbers.
        query: ``[group, heads, Q_S, D]``.
        key: float32 ``[group, kv_heads, KV_S, D]``; anything beyond a request's length.
        value: float32 ``[group, kv_heads, KV_S, D_v]``; likewise.
        lengths: int64 ``[group]``, keys of each request.

    Returns:
        float32 ``[group, heads, Q_S, D_v]``, and, if wanted, the logarithm of the softmax's
        denominators ``[group, heads, Q_S]``, infinite where nothing was attended.
    """
    size, heads, tokens, width = query.shape
    kv_heads, kv_tokens = key.shape[1:3]
    rows = query.float().reshape(size, kv_heads, -1, width)  # [..., heads / kv_heads * Q_S, D]
    scores = torch.matmul(rows, key.transpose(-1, -2)).mul_(call.scale)
    scores = scores.view(size, heads, tokens, kv_tokens)
    masked = _masked(call, group, tokens, kv_tokens, lengths)
    if masked is not None:
        scores.masked_fill_(masked[:, None], -torch.inf)
    total = None
    if call.sink is not None:
        sink = call.sink.float()[:, None, None].expand(size, heads, tokens, 1)
        weights = torch.cat((scores, sink), -1).softmax(-1)[..., :kv_tokens]
    else:
        weights = scores.softmax(-1)
        total = scores.logsumexp(-1) if call.wants_lse else None
    if masked is not None:
        nothing = masked.all(-1)[:, None]  # [group, 1, Q_S]
        weights = weights.masked_fill_(nothing[..., None], 0.0)
        total = None if total is None else total.masked_fill(nothing, torch.inf)
        beyond = torch.arange(kv_tokens) >= lengths[:, None]  # [group, KV_S]
        value = value.masked_fill(beyond[:, None, :, None], 0.0)  # 0 times what lies there is 0
    result = torch.matmul(weights.reshape(size, kv_heads, -1, kv_tokens), value)
    return result.view(size, heads, tokens, -1), total


def _masked(
    call: AttentionCall, group: list[int], tokens: int, keys: int, lengths: torch.Tensor
) -> torch.Tensor | None:
    """Return bool ``[group, Q_S, KV_S]``, true where a query must not see a key, or None."""
    mode = call.sparse_mode
    if call.max_query == 1 and not call.flat and call.query_rope is None and mode > 1:
        mode = _INVALID  # "with Q_S = 1 and no rope, sparse_mode is invalid"
    uniform = bool((lengths == keys).all())
    if mode == _RIGHT_DOWN and tokens == 1:
        mode = _INVALID  # the last query sees every key
    if uniform and (mode == _INVALID or (mode < _LEFT_UP and call.mask is None)):
        return None
    positions = torch.arange(keys)
    masked = (positions >= lengths[:, None])[:, None].expand(-1, tokens, -1)
    if mode >= _LEFT_UP or (mode == 0 and call.mask is not None):
        shift = lengths - tokens if mode > _LEFT_UP else torch.zeros_like(lengths)
        # Distance of a key from the query's own position: [group, Q_S, KV_S].
        ahead = positions - torch.arange(tokens)[:, None] - shift[:, None, None]
        if mode in (0, _BAND):
            masked = masked | (ahead > call.next_tokens) | (ahead < -call.pre_tokens)
        else:
            masked = masked | (ahead > 0)
    if mode in (0, 1) and call.mask is not None:
        masked = masked | _full_mask(call, call.mask, group)[:, :tokens, :keys]
    return masked


def _full_mask(call: AttentionCall, mask: torch.Tensor, group: list[int]) -> torch.Tensor:
    """Return a mask for some requests, ``[group or 1, Q_S, KV_S]``."""
    if mask.dim() == 2 and call.max_query == 1 and mask.shape[0] == call.requests:
        mask = mask[:, None]  # (B, KV_S)
    mask = mask.reshape(-1, *mask.shape[-2:]).bool()
    return mask[group] if mask.shape[0] > 1 else mask


def _paged(call: AttentionCall, group: list[int], tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return keys and values of requests, float32 ``[group, kv_heads, tokens, D]``."""
    assert call.block_table is not None
    kv_counts = call.key_lengths()
    held = [-(-kv_counts[each] // call.block_size) for each in group]
    table = call.block_table[group, : max(held)].long()  # [group, blocks]
    table = table.masked_fill(torch.arange(max(held)) >= torch.tensor(held)[:, None], 0)
    limit = min(call.key.shape[0], call.value.shape[0])
    if int(table.min()) < 0 or int(table.max()) >= limit:
        raise IndexError(
            f"the block table of requests {group} names {sorted(set(table.view(-1).tolist()))}; "
            f"allowed: 0 to {limit - 1}"
        )
    key, value = _pages(call, call.key, table, tokens), _pages(call, call.value, table, tokens)
    if call.key_scale is not None and call.value_scale is not None:
        key = key * _scales(call, call.key_scale, call.key_mode, group, table, tokens)
        value = value * _scales(call, call.value_scale, call.value_mode, group, table, tokens)
    if call.key_rope is not None:
        key = torch.cat((key, _pages(call, call.key_rope, table, tokens)), -1)
    return key, value


def _pages(
    call: AttentionCall, cache: torch.Tensor, table: torch.Tensor, tokens: int
) -> torch.Tensor:
    """Gather pages as float32 ``[group, kv_heads, tokens, D]``."""
    size, heads = table.shape[0], call.kv_heads
    pages = cache[table].float()
    if cache.dim() == 5:  # NZ: [group, blocks, kv_heads, D / C0, block, C0]
        pages = pages.permute(0, 2, 1, 4, 3, 5)
    elif cache.dim() == 4:  # [group, blocks, kv_heads, block, D]
        pages = pages.transpose(1, 2)
    else:  # [group, blocks, block, kv_heads * D]
        pages = pages.unflatten(-1, (heads, -1)).permute(0, 3, 1, 2, 4)
    return pages.reshape(size, heads, -1, call.key_width(cache))[:, :, :tokens]


def _unpaged(call: AttentionCall, counts: list[int]) -> Reader:
    """Return a reader of keys and values that lie in one tensor."""
    keys = split(call.key, call.layout, call.kv_heads, counts)
    values = split(call.value, call.layout, call.kv_heads, counts)
    if call.key_rope is not None:
        ropes = split(call.key_rope, call.layout, call.kv_heads, counts)
        keys = [torch.cat(pair, -1) for pair in zip(keys, ropes, strict=True)]

    def read(group: list[int], tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
        key = torch.stack([keys[each] for each in group]).float()
        value = torch.stack([values[each] for each in group]).float()
        if call.key_scale is not None and call.value_scale is not None:
            none = torch.empty(0, dtype=torch.long)
            key = key * _scales(call, call.key_scale, call.key_mode, group, none, tokens)
            value = value * _scales(call, call.value_scale, call.value_mode, group, none, tokens)
        return key, value

    return read


def _scales(
    call: AttentionCall,
    scale: torch.Tensor,
    mode: int,
    group: list[int],
    table: torch.Tensor,
    tokens: int,
) -> torch.Tensor:
    """Return scales that broadcast against ``[group, kv_heads, tokens, D]``."""
    scale, heads = scale.float(), call.kv_heads
    if mode == _CHANNEL:
        return scale.reshape(()) if scale.numel() == 1 else scale.reshape(heads, 1, -1)
    if mode == _HEAD:
        return scale.reshape(heads, 1, 1)
    if mode == _TOKEN:
        return scale.reshape(-1, scale.shape[-1])[group, None, :tokens, None]
    if mode == _TOKEN_HEAD:
        return scale.reshape(-1, heads, scale.shape[-1])[group, :, :tokens, None]
    if mode == _PAGED_TOKEN:
        return scale[table].flatten(1)[:, None, :tokens, None]
    if mode == _PAGED_TOKEN_HEAD:  # [group, blocks, kv_heads, block]
        return scale[table].transpose(1, 2).flatten(2)[:, :, :tokens, None]
    raise NotImplementedError(f"antiquantisation mode {mode} is not simulated")


def _write_lse(call: AttentionCall, sums: list[torch.Tensor]) -> None:
    if not call.wants_lse:
        call.lse.zero_()
    elif call.flat:
        call.lse.copy_(torch.cat(sums, 1).t()[..., None])  # [T, heads, 1]
    else:
        call.lse.copy_(torch.stack(sums)[..., None])  # [B, heads, Q_S, 1]


def _traffic(version: int, *args: Any) -> int:
    """Count query, output, the keys and values of each request's tokens, and their scales.

    Latents, which are keys and values at once, are read once.
    """
    call = AttentionCall.of(version, args)
    tokens = sum(max(0, n) for n in call.key_lengths())
    total = call.query.nbytes + call.out.nbytes
    caches = [(call.key, call.key_scale, call.key_mode)]
    if call.value.data_ptr() != call.key.data_ptr():
        caches.append((call.value, call.value_scale, call.value_mode))
    if call.query_rope is not None and call.key_rope is not None:
        total += call.query_rope.nbytes
        caches.append((call.key_rope, None, 0))
    for cache, scale, mode in caches:
        width = call.key_width(cache)
        total += tokens * call.kv_heads * width * cache.element_size()
        if scale is not None:
            paged_heads = {_PAGED_TOKEN: 1, _PAGED_TOKEN_HEAD: call.kv_heads}.get(mode)
            total += tokens * paged_heads * scale.element_size() if paged_heads else scale.nbytes
    if call.block_table is not None:
        total += call.block_table.nbytes
    return total


def _nothing(*_: Any) -> None:
    """The query for a workspace computes nothing."""


for _version, _signature in SIGNATURES.items():
    _name = f"aclnnFusedInferAttentionScoreV{_version}"
    operator(
        _name,
        _signature,
        check=partial(check_call, _version),
        traffic=partial(_traffic, _version),
    )(partial(_compute, _version))
    operator(_name + "GetMaxWorkspaceSize", _signature, check=partial(check_shapes, _version))(
        _nothing
    )
