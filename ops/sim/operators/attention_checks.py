"""What the fused infer attention operator refuses.

``_DOC`` is its documentation in op-plugin, ``_TILING`` the checks of its host code in CANN's
ops-transformer for arch32 (910B, 910C).
"""

from __future__ import annotations

from typing import Any

import torch

from ..constraints import ConstraintError, require_contiguous, require_dtype
from .attention_call import AttentionCall
from .attention_rope import LATENT_HEADS, check_rope

_DOC = "docs/zh/custom_APIs/torch_npu/torch_npu-npu_fused_infer_attention_score.md"
_TILING = "ops-transformer, fused_infer_attention_score_tiling_check*.cpp"
_INCREMENTAL = "ops-transformer, incre_flash_attention_tiling*.cpp"

LAYOUTS = (
    *("BSH", "BSND", "BNSD", "TND", "NTD"),
    *("BSH_BNSD", "BSND_BNSD", "BNSD_BSND", "NTD_TND", "TND_NTD"),
    *("BSH_NBSD", "BSND_NBSD", "BNSD_NBSD"),
)

MAX_HEADS = 256
MAX_GROUP = 64
MAX_HEAD_DIM = 512
MAX_REQUESTS_FLAT = 4096

#: (D of query and key, D of value) of NZ pages without quantisation and without rope.
NZ_HEAD_DIMS = ((64, 64), (128, 128), (192, 128))

#: (heads, kv heads) of int8 NZ pages.
INT8_NZ_HEADS = ((10, 1), (64, 8), (80, 8), (128, 16))
INT8_NZ_BLOCKS = (128, 512)

_MASK_SIDE = 2048
_FLOATS = (torch.bfloat16, torch.float16)
_PAGED_SCALES = (4, 5)


def check_shapes(version: int, *args: Any) -> None:
    """Check what does not depend on lengths (the query for the largest workspace)."""
    _check_shapes(AttentionCall.of(version, args))


def check_call(version: int, *args: Any) -> None:
    """Check one call."""
    call = AttentionCall.of(version, args)
    _check_shapes(call)
    _check_lengths(call)


def _check_shapes(call: AttentionCall) -> None:
    if call.unsimulated:
        raise NotImplementedError(f"not simulated: {', '.join(call.unsimulated)}")
    _check_tensors(call)
    _check_heads(call)
    if call.paged:
        _check_pages(call)
    elif call.key.dim() != call.query.dim():
        raise ConstraintError(
            f"key {tuple(call.key.shape)} must have query's dimensions {tuple(call.query.shape)} "
            "without a block table",
            _DOC,
        )
    _check_mask(call)
    if call.sink is not None:
        _check_sink(call)
    if call.key.dtype == torch.int8:
        _check_int8(call)


def _check_tensors(call: AttentionCall) -> None:
    require_contiguous(
        _DOC,
        query=call.query,
        key=call.key,
        value=call.value,
        atten_mask=call.mask,
        block_table=call.block_table,
        key_antiquant_scale=call.key_scale,
        value_antiquant_scale=call.value_scale,
    )
    require_dtype(_TILING, _FLOATS, query=call.query)
    require_dtype(_TILING, (call.query.dtype, torch.int8), key=call.key)
    require_dtype(_TILING, (call.key.dtype,), value=call.value)
    require_dtype(_TILING, (call.query.dtype,), attention_out=call.out)
    check_rope(call)
    if call.mask is not None:
        require_dtype(_DOC, (torch.bool, torch.int8, torch.uint8), atten_mask=call.mask)


def _check_heads(call: AttentionCall) -> None:
    name = call.layout + (f"_{call.out_layout}" if call.out_layout != call.layout else "")
    if name not in LAYOUTS:
        raise ConstraintError(f"input_layout {name}; allowed: {', '.join(LAYOUTS)}", _TILING)
    heads, kv_heads = call.heads, call.kv_heads
    group = MAX_GROUP if call.query_rope is None else max(MAX_GROUP, *LATENT_HEADS)
    if heads % kv_heads or heads // kv_heads > group or heads > MAX_HEADS:
        raise ConstraintError(
            f"num_heads {heads} must be a multiple of num_key_value_heads {kv_heads}, at most "
            f"{group} times as many and at most {MAX_HEADS}",
            _DOC,
        )
    axis = {"TND": 1, "NTD": 0, "BSND": 2, "BNSD": 1}.get(call.layout)
    if axis is not None and call.query.shape[axis] != heads:
        raise ConstraintError(
            f"query {tuple(call.query.shape)} in {call.layout} does not have num_heads {heads}",
            _DOC,
        )
    width = call.query_width(call.query)
    for tensor, expected in ((call.key, width), (call.value, None)):
        found = call.key_width(tensor)
        if expected is not None and found != expected:
            raise ConstraintError(f"key's head dimension {found} differs from {width}", _DOC)
        alignment = 32 if tensor.dtype == torch.int8 else 16
        if found > MAX_HEAD_DIM or found % alignment:
            raise ConstraintError(
                f"head dimension {found} must be a multiple of {alignment} up to {MAX_HEAD_DIM}",
                _DOC,
            )


def _check_pages(call: AttentionCall) -> None:
    table = call.block_table
    assert table is not None
    if table.dtype != torch.int32 or table.dim() != 2:
        raise ConstraintError(
            f"block_table {tuple(table.shape)} {table.dtype} must be int32 with two dimensions",
            _DOC,
        )
    arrangement = call.page_format
    axis = {"BnBsH": 1, "BnNBsD": 2, "NZ": 3}.get(arrangement)
    if axis is None or call.key.dim() != call.value.dim():
        raise ConstraintError(
            f"pages of key {tuple(call.key.shape)} and value {tuple(call.value.shape)} are none of "
            "[blocks, block, H], [blocks, N, block, D], [blocks, N, D / C0, block, C0]",
            _DOC,
        )
    if arrangement == "BnNBsD" and call.layout in ("BSH", "BSND"):
        raise ConstraintError(
            f"pages [blocks, N, block, D] need layout BNSD or TND, not {call.layout}", _DOC
        )
    for name, cache in (("key", call.key), ("value", call.value)):
        if cache.shape[axis] != call.block_size:
            raise ConstraintError(
                f"{name} pages {tuple(cache.shape)} do not have block_size {call.block_size}", _DOC
            )
        if arrangement != "BnBsH" and cache.shape[1] != call.kv_heads:
            raise ConstraintError(
                f"{name} pages {tuple(cache.shape)} do not have {call.kv_heads} kv heads", _DOC
            )
        if arrangement == "NZ" and cache.shape[4] * cache.element_size() != 32:
            raise ConstraintError(
                f"{name} pages {tuple(cache.shape)}: C0 must be 32 bytes, "
                f"{32 // cache.element_size()} elements",
                _DOC,
            )
    _check_block_size(call)
    dims = (call.query_width(call.query), call.key_width(call.value))
    nz_floats = arrangement == "NZ" and call.key.dtype != torch.int8
    if nz_floats and call.query_rope is None and dims not in NZ_HEAD_DIMS:
        raise ConstraintError(
            f"NZ pages with head dimensions (query, value) {dims}; allowed: {NZ_HEAD_DIMS}",
            _TILING,
        )


def _check_block_size(call: AttentionCall) -> None:
    size = call.block_size
    if call.key.dtype == torch.int8:
        allowed, ok = "multiples of 32 up to 512", 0 < size <= 512 and size % 32 == 0
    elif call.flat or call.page_format == "NZ" or call.query_rope is not None:
        allowed, ok = "multiples of 16 up to 1024", 0 < size <= 1024 and size % 16 == 0
    elif call.max_query > 1:
        allowed, ok = "multiples of 128 up to 512", 0 < size <= 512 and size % 128 == 0
    else:
        allowed, ok = "multiples of 16 up to 512", 0 < size <= 512 and size % 16 == 0
    if not ok:
        raise ConstraintError(
            f"block_size {size} in {call.layout} with {call.max_query} query tokens; allowed: "
            f"{allowed}",
            _DOC,
        )


def _check_mask(call: AttentionCall) -> None:
    mode, mask = call.sparse_mode, call.mask
    if not 0 <= mode <= 4:
        raise ConstraintError(f"sparse_mode {mode}; allowed: 0 to 4", _DOC)
    if mode and mask is None:
        raise ConstraintError(f"sparse_mode {mode} needs atten_mask", _TILING)
    if mode >= 2 and mask is not None:
        shape = tuple(mask.shape)
        if shape[-2:] != (_MASK_SIDE, _MASK_SIDE) or mask.numel() != _MASK_SIDE**2:
            raise ConstraintError(
                f"atten_mask {shape} of sparse_mode {mode} must be ({_MASK_SIDE}, {_MASK_SIDE})",
                _DOC,
            )
    if mode < 2 and mask is not None and call.flat:
        raise NotImplementedError(
            f"a full mask in layout {call.layout} is not simulated; use sparse_mode 3 or 4"
        )


def _check_sink(call: AttentionCall) -> None:
    assert call.sink is not None
    if call.layout not in ("TND", "NTD"):
        raise ConstraintError(
            f"learnable_sink needs layout TND or NTD_TND, not {call.layout}", _DOC
        )
    if tuple(call.sink.shape) != (call.heads,):
        raise ConstraintError(
            f"learnable_sink {tuple(call.sink.shape)} must be [num_heads] = ({call.heads},)", _DOC
        )
    if call.key_width(call.value) > 128:
        raise ConstraintError("learnable_sink needs a value head dimension of at most 128", _DOC)
    if call.wants_lse:
        raise NotImplementedError("softmax_lse_flag with learnable_sink is not simulated")


def _check_int8(call: AttentionCall) -> None:
    key_scale, value_scale = call.key_scale, call.value_scale
    if key_scale is None or value_scale is None:
        raise ConstraintError(
            "int8 key and value need key_antiquant_scale and value_antiquant_scale", _DOC
        )
    modes = (call.key_mode, call.value_mode)
    if modes[0] != modes[1] and modes != (0, 1):
        raise ConstraintError(
            f"key and value antiquant modes {modes} must be equal or (0, 1)", _DOC
        )
    if not 0 <= modes[0] <= 5:
        raise ConstraintError(f"antiquant mode {modes[0]}; allowed: 0 to 5", _INCREMENTAL)
    if call.page_format == "NZ" and call.paged:
        _check_int8_nz(call)
    elif call.max_query > 1 and modes[0] > 1:
        raise ConstraintError(
            f"antiquant modes {modes} with {call.max_query} query tokens; with more than one only "
            "0 and 1 are allowed",
            _DOC,
        )
    elif call.max_query > 1 and call.paged:
        raise ConstraintError(
            f"int8 pages that are not NZ allow one query token, not {call.max_query}", _DOC
        )
    if modes[0] in _PAGED_SCALES and not call.paged:
        raise ConstraintError(f"antiquant mode {modes[0]} needs a block table", _INCREMENTAL)
    for name, scale, mode in (("key", key_scale, modes[0]), ("value", value_scale, modes[1])):
        _check_scale(call, name, scale, mode)


def _check_scale(call: AttentionCall, name: str, scale: torch.Tensor, mode: int) -> None:
    # Modes 0 and 2 follow the query's type, those per token are float32.
    wanted = call.query.dtype if mode in (0, 2) else torch.float32
    if scale.dtype != wanted:
        raise ConstraintError(
            f"{name}_antiquant_scale is {scale.dtype}; mode {mode} needs {wanted}", _INCREMENTAL
        )
    blocks = call.key.shape[0]
    expected = {
        4: (blocks, call.block_size),
        5: (blocks, call.kv_heads, call.block_size),
    }.get(mode)
    if expected is not None and tuple(scale.shape) != expected:
        raise ConstraintError(
            f"{name}_antiquant_scale {tuple(scale.shape)} of mode {mode} must be {expected}", _DOC
        )


def _check_int8_nz(call: AttentionCall) -> None:
    where = _INCREMENTAL + " (GQA with KV NZ)"
    heads, modes = (call.heads, call.kv_heads), (call.key_mode, call.value_mode)
    width = call.query_width(call.query)
    if call.query.dtype != torch.bfloat16:
        raise ConstraintError(f"query is {call.query.dtype}; int8 NZ pages need bfloat16", where)
    if width != 128 or call.key_width(call.value) != 128:
        raise ConstraintError(f"head dimension {width}; int8 NZ pages need 128", where)
    if heads not in INT8_NZ_HEADS:
        raise ConstraintError(f"(heads, kv heads) {heads}; allowed: {INT8_NZ_HEADS}", where)
    if call.layout not in ("BSH", "BSND", "BNSD") or call.out_layout != call.layout:
        raise ConstraintError(f"layout {call.layout}; allowed: BSH, BSND, BNSD", where)
    if call.block_size not in INT8_NZ_BLOCKS:
        raise ConstraintError(f"block_size {call.block_size}; allowed: {INT8_NZ_BLOCKS}", where)
    if modes not in ((0, 0), (1, 1)):
        raise ConstraintError(
            f"antiquant modes {modes}; NZ pages allow 0 (per channel) and 1 (per token). Scales in "
            "pages (mode 5) need pages that are not NZ",
            where + ", CheckKVAntiQuantMode",
        )
    if call.inner_precise != 1:
        raise ConstraintError(f"inner_precise {call.inner_precise}; allowed: 1", where)
    if call.wants_lse:
        raise ConstraintError("softmax_lse_flag is not allowed", where)
    _check_int8_nz_queries(call, where)
    _check_int8_nz_scales(call, where)


def _check_int8_nz_queries(call: AttentionCall, where: str) -> None:
    tokens = call.max_query
    if not 1 <= tokens <= 16:
        raise ConstraintError(f"{tokens} query tokens; int8 NZ pages allow 1 to 16", where)
    if tokens == 1 and (call.sparse_mode or call.mask is not None):
        raise ConstraintError("one query token needs sparse_mode 0 and no mask", where)
    if tokens > 1 and (call.sparse_mode != 3 or call.mask is None or call.mask.dim() != 2):
        raise ConstraintError(
            f"{tokens} query tokens need sparse_mode 3 and a mask with two dimensions", where
        )


def _check_int8_nz_scales(call: AttentionCall, where: str) -> None:
    assert call.block_table is not None
    n = call.kv_heads
    channel = {"BNSD": (n, 1, 128), "BSND": (n, 128), "BSH": (n * 128,)}[call.layout]
    tokens = call.block_table.shape[1] * call.block_size
    for name, scale in (("key", call.key_scale), ("value", call.value_scale)):
        assert scale is not None
        shape = tuple(scale.shape)
        if call.key_mode == 0 and shape != channel:
            raise ConstraintError(
                f"{name}_antiquant_scale {shape} per channel in {call.layout} must be {channel}",
                where,
            )
        per_token = len(shape) == 2 and shape[0] == call.requests and shape[1] >= tokens
        if call.key_mode == 1 and not per_token:
            raise ConstraintError(
                f"{name}_antiquant_scale {shape} per token must be [{call.requests}, at least "
                f"{tokens}]",
                where,
            )


def _check_lengths(call: AttentionCall) -> None:
    if call.flat:
        _check_cumulated(call)
    if call.paged and call.kv_lengths is None:
        raise ConstraintError("a block table needs actual_seq_lengths_kv", _DOC)
    queries, keys = call.query_lengths(), call.key_lengths()
    if len(keys) != len(queries):
        raise ConstraintError(
            f"{len(queries)} requests have {len(keys)} actual_seq_lengths_kv", _TILING
        )
    if call.block_table is not None:
        limit = int(call.block_table.shape[1]) * call.block_size
        if call.block_table.shape[0] != len(queries):
            raise ConstraintError(
                f"block_table {tuple(call.block_table.shape)} must have one row for each of "
                f"{len(queries)} requests",
                _DOC,
            )
    elif call.flat:
        limit = int(call.key.shape[0 if call.layout == "TND" else 1])
    else:
        limit = int(call.key.shape[2 if call.layout == "BNSD" else 1])
    wrong = [n for n in keys if not 0 <= n <= limit]
    if wrong:
        raise ConstraintError(f"actual_seq_lengths_kv {wrong} outside 0 to KV_S {limit}", _TILING)
    wrong = [n for n in queries if not 0 <= n <= call.max_query]
    if wrong:
        raise ConstraintError(f"actual_seq_lengths {wrong} outside 0 to Q_S", _TILING)


def _check_cumulated(call: AttentionCall) -> None:
    queries, keys = call.q_lengths, call.kv_lengths
    if queries is None or keys is None:
        raise ConstraintError(
            f"layout {call.layout} needs actual_seq_lengths and actual_seq_lengths_kv", _TILING
        )
    if len(queries) > MAX_REQUESTS_FLAT:
        raise ConstraintError(f"{len(queries)} requests; at most {MAX_REQUESTS_FLAT}", _DOC)
    cumulated = [("actual_seq_lengths", queries)]
    if not call.paged:
        cumulated.append(("actual_seq_lengths_kv", keys))
    for name, values in cumulated:
        if any(b < a for a, b in zip([0, *values], values, strict=False)):
            raise ConstraintError(
                f"{name} {values} of layout {call.layout} are sums and must not fall", _DOC
            )
    tokens = int(call.query.shape[0 if call.layout == "TND" else 1])
    if queries[-1] != tokens:
        raise ConstraintError(
            f"the last of actual_seq_lengths {queries} must be T = {tokens}", _TILING
        )
