"""What the fused infer attention operator refuses of latent attention (MLA).

Rotary parts beside queries and keys (``query_rope``, ``key_rope``) make a call latent attention.
``_DOC`` is the section on MLA of the documentation in op-plugin, ``_TILING`` the checks of the
operator's host code.
"""

from __future__ import annotations

from ..constraints import ConstraintError, require_contiguous, require_dtype
from .attention_call import AttentionCall

_DOC = "docs/zh/custom_APIs/torch_npu/torch_npu-npu_fused_infer_attention_score.md, MLA"
_TILING = "ops-transformer, fused_infer_attention_score_tiling_check_feature.cpp, ...MlaNoQuant..."

_LATENT_DIM, _ROPE_DIM = 512, 64
_HEAD_DIMS = (128, _LATENT_DIM)

#: Query heads over the one latent of 512.
LATENT_HEADS = (1, 2, 4, 8, 16, 32, 64, 128)

_LATENT_LAYOUTS = (
    *("BSH", "BSND", "BNSD", "TND"),
    *("BSH_NBSD", "BSND_NBSD", "BNSD_NBSD", "TND_NTD"),
)
_LATENT_SPARSE_MODES = (0, 3, 4)


def check_rope(call: AttentionCall) -> None:
    """Check the rotary parts, and what latents of 512 demand besides."""
    query, key = call.query_rope, call.key_rope
    width = call.query_width(call.query)
    if query is None and key is None:
        if width == _LATENT_DIM and call.flat:
            raise ConstraintError(f"head dimension {width} in TND needs query_rope", _DOC)
        return
    if query is None or key is None:
        raise ConstraintError("query_rope and key_rope must be given together", _DOC)
    require_contiguous(_DOC, query_rope=query, key_rope=key)
    require_dtype(_DOC, (call.query.dtype,), query_rope=query)
    require_dtype(_DOC, (call.key.dtype,), key_rope=key)
    ropes = (call.query_width(query), call.key_width(key))
    if width not in _HEAD_DIMS or ropes != (_ROPE_DIM, _ROPE_DIM):
        raise ConstraintError(
            f"query's head dimension {width} with rope {ropes}; allowed: {_HEAD_DIMS} with 64", _DOC
        )
    _check_shapes(call)
    if width == _LATENT_DIM:
        _check_latents(call)
    elif call.paged and call.page_format == "NZ":
        raise ConstraintError(f"NZ pages with rope and head dimension {width}; allowed: 512", _DOC)


def _check_shapes(call: AttentionCall) -> None:
    """Rotary parts are shaped like what they belong to, but for the head dimension."""
    assert call.query_rope is not None
    assert call.key_rope is not None
    if call.layout != "BSH" and call.query_rope.shape[:-1] != call.query.shape[:-1]:
        raise ConstraintError(
            f"query_rope {tuple(call.query_rope.shape)} must be like query "
            f"{tuple(call.query.shape)} but for the last dimension",
            _TILING,
        )
    key, rope = list(call.key.shape), list(call.key_rope.shape)
    # In NZ the head dimension is cut in two: [blocks, N, D / C0, block, C0].
    widths = (2, 4) if call.paged and len(key) == 5 else (len(key) - 1,)
    if len(key) != len(rope) or any(
        size != rope[axis] for axis, size in enumerate(key) if axis not in widths
    ):
        raise ConstraintError(f"key_rope {tuple(rope)} must be like key {tuple(key)}", _TILING)
    if len(widths) == 2 and rope[4] * call.key_rope.element_size() != 32:
        raise ConstraintError(f"key_rope {tuple(rope)}: C0 must be 32 bytes", _TILING)


def _check_latents(call: AttentionCall) -> None:
    heads = (call.heads, call.kv_heads)
    if heads[1] != 1 or heads[0] not in LATENT_HEADS:
        raise ConstraintError(
            f"(heads, kv heads) {heads} with head dimension 512; allowed: {LATENT_HEADS} with 1",
            _DOC,
        )
    layout = call.layout + (f"_{call.out_layout}" if call.out_layout != call.layout else "")
    if layout not in _LATENT_LAYOUTS:
        raise ConstraintError(
            f"input_layout {layout} with head dimension 512; allowed: {', '.join(_LATENT_LAYOUTS)}",
            _TILING,
        )
    if call.sparse_mode not in _LATENT_SPARSE_MODES:
        raise ConstraintError(
            f"sparse_mode {call.sparse_mode} with head dimension 512; allowed: "
            f"{_LATENT_SPARSE_MODES}",
            _TILING,
        )
    if call.key_width(call.value) != _LATENT_DIM:
        raise ConstraintError(
            f"value's head dimension {call.key_width(call.value)} with rope; it must be the key's",
            _TILING,
        )
    if call.wants_lse:
        raise ConstraintError("softmax_lse_flag with head dimension 512 is not allowed", _DOC)
