"""Latent attention (MLA): 512 channels that are keys and values, and 64 rotary ones beside them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from sim_attention import Batch, causal_mask, make_batch, paged, reference
from sim_parity import launches

BLOCK = 16


def _parts(lengths: list[tuple[int, int]], heads: int = 8) -> tuple[Batch, Batch, Batch]:
    """Return latents, rotary parts, and what attention over both must compute."""
    latent, rope = make_batch(lengths, heads, 1, 512), make_batch(lengths, heads, 1, 64)
    latent = Batch(latent.queries, latent.keys, latent.keys)
    whole = Batch(
        [torch.cat(pair, -1) for pair in zip(latent.queries, rope.queries, strict=True)],
        [torch.cat(pair, -1) for pair in zip(latent.keys, rope.keys, strict=True)],
        latent.values,
    )
    return latent, rope, whole


@pytest.mark.parametrize("arrangement", ["BnBsH", "NZ"])
def test_one_token_each(arrangement: str) -> None:
    import torch_npu

    latent, rope, whole = _parts([(1, 200), (1, 40)])
    pages, ropes = paged(latent, 128, arrangement), paged(rope, 128, arrangement)

    def rows(tensors: list[torch.Tensor]) -> torch.Tensor:
        return torch.stack(tensors).transpose(1, 2).contiguous().npu()  # [B, S, N, D]

    result, _ = torch_npu.npu_fused_infer_attention_score(
        *(rows(latent.queries), pages.key, pages.value),
        query_rope=rows(rope.queries),
        key_rope=ropes.key,
        block_table=pages.table,
        block_size=128,
        input_layout="BSND",
        actual_seq_lengths_kv=latent.kv_lengths,
        num_heads=8,
        num_key_value_heads=1,
        scale=whole.scale,
    )
    found = result.cpu().double().transpose(1, 2)
    torch.testing.assert_close(found, torch.stack(reference(whole)), atol=2**-7, rtol=2**-7)
    assert launches()["aclnnFusedInferAttentionScoreV3"]


def _ragged(lengths: list[tuple[int, int]], heads: int, **changes: Any) -> dict[str, Any]:
    """Arguments of a call over NZ pages in layout TND, with changes."""
    latent, rope, whole = _parts(lengths, heads)
    pages, ropes = paged(latent, BLOCK, "NZ"), paged(rope, BLOCK, "NZ")
    arguments: dict[str, Any] = {
        "query": latent.flat(latent.queries).npu(),
        "key": pages.key,
        "value": pages.key,
        "query_rope": rope.flat(rope.queries).npu(),
        "key_rope": ropes.key,
        "atten_mask": causal_mask(),
        "block_table": pages.table,
        "input_layout": "TND",
        "block_size": BLOCK,
        "actual_seq_lengths": latent.cumulated,
        "actual_seq_lengths_kv": latent.kv_lengths,
        "num_heads": heads,
        "num_key_value_heads": 1,
        "scale": whole.scale,
        "sparse_mode": 3,
    }
    return {
        name: value(arguments) if callable(value) else value
        for name, value in {**arguments, **changes}.items()
    }


@pytest.mark.parametrize("heads", [1, 128])
def test_ragged_batches(heads: int) -> None:
    import torch_npu

    lengths = [(1, 33), (5, 20), (18, 18), (1, 0)]
    out = torch_npu.npu_fused_infer_attention_score(**_ragged(lengths, heads))[0].cpu()
    _, _, whole = _parts(lengths, heads)
    expected = whole.flat([each.float() for each in reference(whole, causal=True)])
    torch.testing.assert_close(out.float(), expected, atol=2**-7, rtol=2**-7)


REFUSED: list[tuple[str, dict[str, Any]]] = [
    ("must be given together", {"key_rope": None}),
    ("head dimension 512 in TND needs query_rope", {"key_rope": None, "query_rope": None}),
    ("query_rope is torch.float16", {"query_rope": lambda a: a["query_rope"].half()}),
    ("key_rope is torch.float16", {"key_rope": lambda a: a["key_rope"].half()}),
    ("key_rope (", {"key_rope": lambda a: a["key_rope"].transpose(0, 2)}),
    ("with rope (32, 64)", {"query_rope": lambda a: a["query_rope"][..., :32].contiguous()}),
    ("with rope (64, 32)", {"key_rope": lambda a: a["key_rope"][:, :, :2].contiguous()}),
    ("must be like query", {"query_rope": lambda a: a["query_rope"][:-1]}),
    ("must be like key", {"key_rope": lambda a: a["key_rope"][:-1]}),
    (
        "head dimension 256 with rope",
        {
            "query": lambda a: a["query"][..., :256].contiguous(),
            "key": lambda a: a["key"][:, :, :16].contiguous(),
            "value": lambda a: a["value"][:, :, :16].contiguous(),
        },
    ),
    (
        "NZ pages with rope and head dimension 128",
        {
            "query": lambda a: a["query"][..., :128].contiguous(),
            "key": lambda a: a["key"][:, :, :8].contiguous(),
            "value": lambda a: a["value"][:, :, :8].contiguous(),
        },
    ),
    (
        "(heads, kv heads) (6, 1)",
        {
            "query": lambda a: a["query"][:, :6].contiguous(),
            "query_rope": lambda a: a["query_rope"][:, :6].contiguous(),
            "num_heads": 6,
        },
    ),
    ("sparse_mode 2 with head dimension 512", {"sparse_mode": 2}),
    ("value's head dimension 256", {"value": lambda a: a["value"][:, :, :16].contiguous()}),
    ("softmax_lse_flag with head dimension 512", {"softmax_lse_flag": True}),
]


@pytest.mark.parametrize("number", range(len(REFUSED)), ids=[text for text, _ in REFUSED])
def test_what_is_refused(number: int) -> None:
    import torch_npu

    text, changes = REFUSED[number]
    with pytest.raises(RuntimeError) as error:
        torch_npu.npu_fused_infer_attention_score(**_ragged([(3, 20), (1, 9)], 8, **changes))
    told = str(error.value)
    assert text in told
    assert "[source: " in told
