"""Rotary position embedding: computed in float32, rounded once."""

from __future__ import annotations

import torch

from ..constraints import ConstraintError
from ..table import operator, write

_ROTARY_MUL = "docs/zh/custom_APIs/torch_npu/torch_npu-npu_rotary_mul.md"
_ROTARY_TILING = "ops-transformer, docs/aclnnRotaryPositionEmbedding.md"
_APPLY = "ops-transformer, docs/aclnnApplyRotaryPosEmbV2.md"

_MROPE = "docs/zh/custom_APIs/torch_npu/torch_npu-npu_mrope.md"

_HALF, _INTERLEAVE, _QUARTER = 0, 1, 2
_MODES = {b"half": _HALF, b"interleave": _INTERLEAVE, b"quarter": _QUARTER}


def rotate(x: torch.Tensor, mode: int) -> torch.Tensor:
    """Return the quadrature partner of each channel of ``[..., head_dim]``."""
    if mode == _HALF:
        a, b = x.chunk(2, -1)
        return torch.cat((-b, a), -1)
    if mode == _QUARTER:
        a, b, c, d = x.chunk(4, -1)
        return torch.cat((-b, a, -d, c), -1)
    even, odd = x[..., ::2], x[..., 1::2]
    return torch.stack((-odd, even), -1).flatten(-2)


def _embed(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, mode: int) -> torch.Tensor:
    """Rotate the first channels of ``[..., head_dim]``, as many as ``cos`` has."""
    wide, rotary = x.float(), cos.shape[-1]
    turned = wide[..., :rotary]
    turned = turned * cos.float() + rotate(turned, mode) * sin.float()
    return torch.cat((turned, wide[..., rotary:]), -1)


def _check_rotary_mul(
    x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, mode: int, *_: object
) -> None:
    if x.dim() not in (3, 4) or cos.shape != sin.shape or cos.dim() != x.dim():
        raise ConstraintError(
            f"x {tuple(x.shape)}, cos {tuple(cos.shape)} and sin {tuple(sin.shape)} must have the "
            "same 3 or 4 dimensions, cos and sin the same shape",
            _ROTARY_MUL,
        )
    if mode not in _MODES.values():
        raise ConstraintError(f"rotary mode {mode}; allowed: 0 half, 1 interleave", _ROTARY_MUL)
    if x.shape[-1] % 2 or x.shape[-1] >= 896:
        raise ConstraintError(
            f"head dimension {x.shape[-1]} must be even and less than 896", _ROTARY_TILING
        )


@operator("aclnnRotaryPositionEmbeddingV2", "TTTiTT", check=_check_rotary_mul)
def _rotary_mul(
    x: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    mode: int,
    matrix: torch.Tensor | None,
    out: torch.Tensor,
) -> None:
    if matrix is not None and matrix.numel():
        raise NotImplementedError("a rotation matrix is not simulated; pass none")
    write(out, _embed(x, cos, sin, mode))


def _check_apply(
    query: torch.Tensor,
    key: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    _layout: int,
    mode: bytes,
) -> None:
    if not (query.dtype == key.dtype == cos.dtype == sin.dtype):
        raise ConstraintError(
            f"query {query.dtype}, key {key.dtype}, cos {cos.dtype} and sin {sin.dtype} must have "
            "one type",
            _APPLY,
        )
    if mode not in _MODES:
        raise ConstraintError(f"rotary mode {mode!r}; allowed: {sorted(_MODES)}", _APPLY)


@operator("aclnnApplyRotaryPosEmbV2", "TTTTic", check=_check_apply)
def _apply(
    query: torch.Tensor,
    key: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    _layout: int,
    mode: bytes,
) -> None:
    # cos and sin have query's dimensions with one head, in every layout.
    write(query, _embed(query, cos, sin, _MODES[mode]))
    write(key, _embed(key, cos, sin, _MODES[mode]))


def _check_cached(
    positions: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    cache: torch.Tensor,
    sections: list[int] | None,
    head_size: int,
    *_: object,
) -> None:
    if not (query.dtype == key.dtype == cache.dtype):
        raise ConstraintError(
            f"query {query.dtype}, key {key.dtype} and cos_sin_cache {cache.dtype} must have one "
            "type",
            _MROPE,
        )
    if positions.dtype not in (torch.int32, torch.int64):
        raise ConstraintError(f"positions are {positions.dtype}; allowed: int32, int64", _MROPE)
    rotary = cache.shape[-1]
    if rotary > head_size or rotary % 2 or query.shape[-1] % head_size or key.shape[-1] % head_size:
        raise ConstraintError(
            f"rotary dimension {rotary}, query {tuple(query.shape)} and key {tuple(key.shape)} do "
            f"not fit head_size {head_size}",
            _MROPE,
        )
    multiple = 16 if query.dtype == torch.float32 else 32
    if head_size % multiple or rotary % multiple:
        raise ConstraintError(
            f"head_size {head_size} and rotary dimension {rotary} must be multiples of {multiple} "
            f"for {query.dtype}",
            _MROPE,
        )
    if positions.dim() != 1 or any(sections or ()):
        raise NotImplementedError("positions in several sections (mrope) are not simulated")


@operator("aclnnRopeWithSinCosCacheV2", "TTTTAibiTT", check=_check_cached)
def _cached(
    positions: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    cache: torch.Tensor,
    _sections: list[int] | None,
    head_size: int,
    neox: bool,
    _cache_mode: int,
    query_out: torch.Tensor,
    key_out: torch.Tensor,
) -> None:
    """Rotate ``[tokens, heads * head_size]`` by rows of ``[positions, cos | sin]``."""
    cos, sin = cache[positions.long()].float().chunk(2, -1)  # [tokens, rotary / 2]
    mode = _HALF if neox else _INTERLEAVE
    spread = (
        (lambda half: torch.cat((half, half), -1))
        if neox
        else (lambda half: half.repeat_interleave(2, -1))
    )
    cos, sin = spread(cos)[:, None], spread(sin)[:, None]  # [tokens, 1, rotary]
    for x, out in ((query, query_out), (key, key_out)):
        heads = x.unflatten(-1, (-1, head_size))
        write(out, _embed(heads, cos, sin, mode).flatten(-2))
