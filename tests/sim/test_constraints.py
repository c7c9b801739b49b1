"""Calls that the hardware refuses fail here, with what is allowed and where that is written."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from sim_attention import Batch, causal_mask, make_batch, paged


def _refused(match: str, function: Any, *args: Any, **kwargs: Any) -> None:
    with pytest.raises(RuntimeError) as error:
        function(*args, **kwargs)
    text = str(error.value)
    assert match in text
    assert "[source: " in text
    assert "aclnn" in text


def _attention(**changes: Any) -> dict[str, Any]:
    """Arguments of a call that is allowed, with changes."""
    batch = make_batch([(3, 20), (1, 9)], 4, 2, 64)
    pages = paged(batch, 16, "NZ")
    arguments: dict[str, Any] = {
        "query": batch.flat(batch.queries).npu(),
        "key": pages.key,
        "value": pages.value,
        "atten_mask": causal_mask(),
        "block_table": pages.table,
        "input_layout": "TND",
        "block_size": 16,
        "actual_seq_lengths": batch.cumulated,
        "actual_seq_lengths_kv": batch.kv_lengths,
        "num_heads": 4,
        "num_key_value_heads": 2,
        "scale": batch.scale,
        "sparse_mode": 3,
    }
    return {
        name: value(arguments) if callable(value) else value
        for name, value in {**arguments, **changes}.items()
    }


def test_the_allowed_call_is_allowed() -> None:
    import torch_npu

    torch_npu.npu_fused_infer_attention_score(**_attention())[0].cpu()


def _as(dtype: torch.dtype) -> dict[str, Any]:
    return {n: lambda a, n=n: a[n].to(dtype) for n in ("query", "key", "value")}


REFUSED: list[tuple[str, dict[str, Any]]] = [
    ("query is torch.float32", _as(torch.float32)),
    ("key is torch.float16", {"key": lambda a: a["key"].half()}),
    ("value is torch.float16", {"value": lambda a: a["value"].half()}),
    ("is not contiguous", {"query": lambda a: a["query"].transpose(0, 1).contiguous().mT.mT.mT}),
    ("must be the last", {"actual_seq_lengths": [3, 5]}),
    ("must not fall", {"actual_seq_lengths": [5, 4]}),
    ("needs actual_seq_lengths", {"actual_seq_lengths": None}),
    ("outside 0 to KV_S 32", {"actual_seq_lengths_kv": [33, 9]}),
    ("must have one row for each", {"block_table": lambda a: a["block_table"][:1].clone()}),
    ("must be int32", {"block_table": lambda a: a["block_table"].long()}),
    ("do not have block_size 32", {"block_size": 32}),
    ("sparse_mode 3 needs atten_mask", {"atten_mask": None}),
    ("must be (2048, 2048)", {"atten_mask": lambda a: a["atten_mask"][:64, :64].contiguous()}),
    ("atten_mask is torch.bfloat16", {"atten_mask": lambda a: a["atten_mask"].bfloat16()}),
    ("sparse_mode 7", {"sparse_mode": 7}),
    ("num_heads 4 must be a multiple", {"num_key_value_heads": 3}),
]


@pytest.mark.parametrize("number", range(len(REFUSED)), ids=[text for text, _ in REFUSED])
def test_attention_refuses(number: int) -> None:
    import torch_npu

    text, changes = REFUSED[number]
    if text == "is not contiguous":
        query = _attention()["query"]
        wide = torch.cat((query, query), -1)
        changes = {"query": wide[..., :64]}
    if text == "must be the last":
        text = "must be T = 4"
    arguments = _attention(**changes)
    with pytest.raises(RuntimeError) as error:
        torch_npu.npu_fused_infer_attention_score(**arguments)
    assert text in str(error.value)


@pytest.mark.parametrize(("head_dim", "value_dim"), [(96, 96), (32, 32), (192, 192), (64, 128)])
def test_nz_head_dimensions(head_dim: int, value_dim: int) -> None:
    import torch_npu

    batch = make_batch([(1, 20)], 2, 2, head_dim, value_dim)
    pages = paged(batch, 16, "NZ")
    changes = {
        "query": batch.flat(batch.queries).npu(),
        "key": pages.key,
        "value": pages.value,
        "block_table": pages.table,
        "actual_seq_lengths": [1],
        "actual_seq_lengths_kv": [20],
        "num_heads": 2,
        "num_key_value_heads": 2,
    }
    _refused(
        "NZ pages with head dimensions",
        torch_npu.npu_fused_infer_attention_score,
        **_attention(**changes),
    )


@pytest.mark.parametrize("block_size", [8, 24, 1040])
def test_block_sizes(block_size: int) -> None:
    import torch_npu

    batch = make_batch([(3, 20), (1, 9)], 4, 2, 64)
    pages = paged(batch, block_size, "NZ")
    changes = {"key": pages.key, "value": pages.value, "block_table": pages.table}
    _refused(
        f"block_size {block_size}",
        torch_npu.npu_fused_infer_attention_score,
        **_attention(**changes, block_size=block_size),
    )


def _int8(heads: int = 10, kv_heads: int = 1, tokens: int = 1, **changes: Any) -> dict[str, Any]:
    """Arguments of an allowed call with int8 NZ pages, with changes."""
    block_size = changes.get("block_size", 128)
    head_dim = changes.pop("head_dim", 128)
    batch = make_batch([(tokens, 50)], heads, kv_heads, head_dim)
    codes = Batch(
        batch.queries, *([each.to(torch.int8) for each in t] for t in (batch.keys, batch.values))
    )
    pages = paged(codes, block_size, "NZ")
    scale = torch.ones(kv_heads, head_dim, dtype=torch.bfloat16).npu()
    arguments: dict[str, Any] = {
        "query": torch.stack(batch.queries).transpose(1, 2).contiguous().npu(),
        "key": pages.key,
        "value": pages.value,
        "key_antiquant_scale": scale,
        "value_antiquant_scale": scale,
        "block_table": pages.table,
        "block_size": block_size,
        "input_layout": "BSND",
        "actual_seq_lengths_kv": [50],
        "num_heads": heads,
        "num_key_value_heads": kv_heads,
        "scale": 0.1,
        "inner_precise": 1,
    }
    if tokens > 1:
        arguments |= {"sparse_mode": 3, "atten_mask": causal_mask()}
    return {**arguments, **changes}


@pytest.mark.parametrize(("heads", "kv_heads"), [(10, 1), (64, 8), (80, 8), (128, 16)])
@pytest.mark.parametrize("tokens", [1, 16])
def test_allowed_int8_calls(heads: int, kv_heads: int, tokens: int) -> None:
    import torch_npu

    torch_npu.npu_fused_infer_attention_score(**_int8(heads, kv_heads, tokens))[0].cpu()


def _scales(*shape: int, dtype: torch.dtype = torch.bfloat16) -> dict[str, Any]:
    scale = torch.ones(shape, dtype=dtype)
    return {"key_antiquant_scale": scale, "value_antiquant_scale": scale}


INT8_REFUSED: list[tuple[str, dict[str, Any]]] = [
    ("(heads, kv heads) (8, 1)", {"heads": 8}),
    ("(heads, kv heads) (32, 8)", {"heads": 32, "kv_heads": 8}),
    ("head dimension 64", {"head_dim": 64}),
    ("block_size 256", {"block_size": 256}),
    ("17 query tokens", {"tokens": 17}),
    ("sparse_mode 3", {"tokens": 2, "sparse_mode": 0, "atten_mask": None}),
    ("inner_precise 0", {"inner_precise": 0}),
    ("softmax_lse_flag", {"softmax_lse_flag": True}),
    (
        "mode 5",
        {
            "key_antiquant_mode": 5,
            "value_antiquant_mode": 5,
            **_scales(3, 1, 128, dtype=torch.float32),
        },
    ),
    ("must be (1, 128)", _scales(128)),
    ("mode 0 needs torch.bfloat16", _scales(1, 128, dtype=torch.float32)),
    (
        "must be [1, at least 128]",
        {
            "key_antiquant_mode": 1,
            "value_antiquant_mode": 1,
            **_scales(1, 64, dtype=torch.float32),
        },
    ),
    ("must be equal", {"key_antiquant_mode": 1}),
    ("need key_antiquant_scale", {"key_antiquant_scale": None, "value_antiquant_scale": None}),
]


@pytest.mark.parametrize("number", range(len(INT8_REFUSED)), ids=[t for t, _ in INT8_REFUSED])
def test_int8_attention_refuses(number: int) -> None:
    import torch_npu

    text, changes = INT8_REFUSED[number]
    changes = {n: v.npu() if isinstance(v, torch.Tensor) else v for n, v in changes.items()}
    _refused(text, torch_npu.npu_fused_infer_attention_score, **_int8(**changes))


def _scatter(**changes: Any) -> list[Any]:
    arguments = {
        "key": torch.zeros(5, 2, 64, dtype=torch.bfloat16).npu(),
        "value": torch.zeros(5, 2, 64, dtype=torch.bfloat16).npu(),
        "key_cache": torch.zeros(3, 8, 16, 16, dtype=torch.bfloat16).npu(),
        "value_cache": torch.zeros(3, 8, 16, 16, dtype=torch.bfloat16).npu(),
        "slots": torch.zeros(5, dtype=torch.int32).npu(),
    }
    return list({**arguments, **changes}.values())


@pytest.mark.parametrize(
    ("text", "changes"),
    [
        ("types", {"key": torch.zeros(5, 2, 64)}),
        ("not contiguous", {"value": torch.zeros(5, 4, 64, dtype=torch.bfloat16)}),
        ("slot_mapping is torch.int16", {"slots": torch.zeros(5, dtype=torch.int16)}),
        ("one slot per token", {"slots": torch.zeros(4, dtype=torch.int32)}),
        ("must be (3, 8, 16, 16)", {"key_cache": torch.zeros(3, 4, 16, 32, dtype=torch.bfloat16)}),
    ],
)
def test_scatter_refuses(text: str, changes: dict[str, torch.Tensor]) -> None:
    import torch_npu

    moved = {name: each.npu() for name, each in changes.items()}
    if text == "not contiguous":
        moved["value"] = moved["value"][:, ::2]
    _refused(text, torch_npu.npu_scatter_pa_kv_cache, *_scatter(**moved), cache_mode="PA_NZ")


def test_other_operators_refuse() -> None:
    import torch_npu

    positions, cache = torch.zeros(3, dtype=torch.int64).npu(), torch.zeros(9, 64).npu()
    query = torch.zeros(3, 128, dtype=torch.bfloat16).npu()
    _refused("must have one type", torch_npu.npu_mrope, positions, query, query, cache, 64)
    narrow = torch.zeros(9, 16, dtype=torch.bfloat16).npu()
    _refused("multiples of 32", torch_npu.npu_mrope, positions, query, query, narrow, 64)
    gamma = torch.zeros(64, dtype=torch.bfloat16).npu()
    _refused("must be the last dimensions", torch_npu.npu_rms_norm, query, gamma)
    _refused("must have one type", torch_npu.npu_add_rms_norm, query, query, query[0].float())
    _refused("x (3, 128) torch.float32", torch_npu.npu_dynamic_quant, query.float())
    scales = torch.ones(128).npu()
    _refused(
        "must have the input's type",
        *(torch_npu.npu_quantize, query, scales, None, torch.qint8, -1, False),
    )
    codes = torch.zeros(3, 64, dtype=torch.int8).npu()
    _refused(
        "scale torch.bfloat16 with pertoken_scale for torch.float16",
        *(torch_npu.npu_quant_matmul, codes, codes.t().contiguous(), scales[:3].bfloat16()),
        pertoken_scale=scales[:3],
        output_dtype=torch.float16,
    )
    logits = torch.zeros(3, 64).npu()
    wide_k = torch.ones(3, dtype=torch.int64).npu()
    _refused("must be torch.int32", torch_npu.npu_top_k_top_p, logits, None, wide_k)
