"""Writes into the paged KV cache."""

from __future__ import annotations

import torch

from ..constraints import ConstraintError, require_contiguous
from ..table import operator

_SCATTER = "docs/zh/custom_APIs/torch_npu/torch_npu-npu_scatter_pa_kv_cache.md"

#: Cubes have 32 bytes per row.
_ROW_BYTES = 32

_ND_MODES = (None, b"", b"Norm")
_NZ_MODE = b"PA_NZ"


def _check_scatter(
    key: torch.Tensor,
    key_cache: torch.Tensor,
    slots: torch.Tensor,
    value: torch.Tensor,
    value_cache: torch.Tensor,
    compress_lens: torch.Tensor | None,
    compress_offsets: torch.Tensor | None,
    seq_lens: torch.Tensor | None,
    mode: bytes | None,
    *_: object,
) -> None:
    given = {"key": key, "value": value, "key_cache": key_cache, "value_cache": value_cache}
    require_contiguous(_SCATTER, **given, slot_mapping=slots)
    types = {name: each.dtype for name, each in given.items()}
    if len(set(types.values())) > 1:
        raise ConstraintError(f"the types {types} must be equal", _SCATTER)
    if slots.dtype not in (torch.int32, torch.int64):
        raise ConstraintError(f"slot_mapping is {slots.dtype}; allowed: int32, int64", _SCATTER)
    if mode not in (*_ND_MODES, _NZ_MODE):
        raise ConstraintError(f"cache_mode {mode!r}; allowed: None, 'Norm', 'PA_NZ'", _SCATTER)
    if any(each is not None for each in (compress_lens, compress_offsets, seq_lens)):
        raise NotImplementedError("compressed caches (compress_lens, seq_lens) are not simulated")
    if key.dim() != 3 or value.dim() != 3 or key.shape[:2] != value.shape[:2]:
        raise ConstraintError(
            f"key {tuple(key.shape)} and value {tuple(value.shape)} must have three dimensions, "
            "the first two equal",
            _SCATTER,
        )
    if slots.dim() != 1 or slots.shape[0] != key.shape[0]:
        raise ConstraintError(
            f"slot_mapping {tuple(slots.shape)} must have one slot per token of key "
            f"{tuple(key.shape)}",
            _SCATTER,
        )
    for rows, cache, name in ((key, key_cache, "key_cache"), (value, value_cache, "value_cache")):
        _check_cache(rows, cache, name, mode)


def _check_cache(rows: torch.Tensor, cache: torch.Tensor, name: str, mode: bytes | None) -> None:
    width = rows.shape[1] * rows.shape[2]
    if cache.dim() != 4:
        raise ConstraintError(f"{name} {tuple(cache.shape)} must have 4 dimensions", _SCATTER)
    if mode != _NZ_MODE:
        expected: tuple[int, ...] = (*cache.shape[:2], *rows.shape[1:])
    else:
        column = _ROW_BYTES // rows.element_size()
        expected = (cache.shape[0], width // column, cache.shape[2], column)
        if width % column:
            raise ConstraintError(f"{width} columns are no multiple of {column}", _SCATTER)
    if tuple(cache.shape) != expected:
        shape = "num_blocks, heads * D / C0, block_size, C0" if mode == _NZ_MODE else ""
        raise ConstraintError(
            f"{name} {tuple(cache.shape)} must be {expected}"
            + (f" = [{shape}], C0 = 32 bytes" if shape else ""),
            _SCATTER,
        )


def _traffic(
    key: torch.Tensor, _kc: object, slots: torch.Tensor, value: torch.Tensor, *_: object
) -> int:
    return 2 * (key.nbytes + value.nbytes) + slots.nbytes


@operator("aclnnScatterPaKvCache", "TTTTTTTTccAA", check=_check_scatter, traffic=_traffic)
def _scatter(
    key: torch.Tensor,
    key_cache: torch.Tensor,
    slots: torch.Tensor,
    value: torch.Tensor,
    value_cache: torch.Tensor,
    _compress_lens: None,
    _compress_offsets: None,
    _seq_lens: None,
    mode: bytes | None,
    *_: object,
) -> None:
    slots = slots.long()
    kept = slots >= 0  # padding tokens have slot -1
    every = bool(kept.all())
    slots = slots if every else slots[kept]
    for rows, cache in ((key, key_cache), (value, value_cache)):
        # [blocks, block, ...]: one row per slot
        by_slot = cache.transpose(1, 2) if mode == _NZ_MODE else cache
        size = by_slot.shape[1]
        if slots.numel() and int(slots.max()) >= by_slot.shape[0] * size:
            raise IndexError(
                f"slot {int(slots.max())} of a cache with {by_slot.shape[0]} blocks of {size}"
            )
        kept_rows = rows if every else rows[kept]
        by_slot[slots // size, slots % size] = kept_rows.reshape(-1, *by_slot.shape[2:])
