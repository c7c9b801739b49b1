"""The fused infer attention operator against attention in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from sim_attention import Batch, attend_pages, causal_mask, make_batch, normal, paged, reference
from sim_parity import launches

#: (query tokens, keys) of requests: prefill, chunked prefill, decode, verification.
MIXED = [(5, 5), (7, 40), (1, 33), (3, 16), (1, 1)]
ERROR = {torch.bfloat16: 2**-7, torch.float16: 2**-9}


def _check(result: torch.Tensor, batch: Batch, expected: list[torch.Tensor]) -> None:
    flat = batch.flat(expected)
    assert result.shape == flat.shape
    error = ERROR[result.dtype]
    torch.testing.assert_close(result.cpu().double(), flat, atol=error, rtol=error)


@pytest.mark.parametrize("dtype", ERROR, ids=str)
@pytest.mark.parametrize("arrangement", ["BnBsH", "BnNBsD", "NZ"])
@pytest.mark.parametrize(
    ("heads", "kv_heads", "dims"), [(4, 2, (64, 64)), (3, 1, (128, 128)), (2, 2, (192, 128))]
)
def test_pages(
    dtype: torch.dtype, arrangement: str, heads: int, kv_heads: int, dims: tuple[int, int]
) -> None:
    batch = make_batch(MIXED, heads, kv_heads, *dims, dtype=dtype)
    pages = paged(batch, 16, arrangement)
    before = launches()["aclnnFusedInferAttentionScoreV2"]
    before += launches()["aclnnFusedInferAttentionScoreV3"]
    result = attend_pages(batch, pages, 16, sparse_mode=3, atten_mask=causal_mask())
    _check(result, batch, reference(batch, causal=True))
    after = launches()["aclnnFusedInferAttentionScoreV2"]
    assert after + launches()["aclnnFusedInferAttentionScoreV3"] == before + 1


@pytest.mark.parametrize("window", [0, 3, 20])
def test_window(window: int) -> None:
    batch = make_batch(MIXED, 4, 2, 64)
    pages = paged(batch, 16, "NZ")
    result = attend_pages(
        *(batch, pages, 16),
        sparse_mode=4,
        atten_mask=causal_mask(),
        pre_tokens=window,
        next_tokens=0,
    )
    _check(result, batch, reference(batch, causal=True, window=window))


def test_without_a_mask_every_key_is_seen() -> None:
    batch = make_batch(MIXED, 4, 2, 64)
    _check(attend_pages(batch, paged(batch, 16, "NZ"), 16), batch, reference(batch))


def test_requests_without_keys_give_zeros() -> None:
    batch = make_batch([(1, 20), (1, 0), (1, 0)], 4, 2, 64)
    pages = paged(batch, 16, "NZ")
    result = attend_pages(batch, pages, 16, sparse_mode=3, atten_mask=causal_mask())
    _check(result, batch, reference(batch, causal=True))
    assert not result[1:].cpu().any()


def test_queries_before_the_first_key_give_zeros() -> None:
    batch = make_batch([(5, 3)], 4, 2, 64)
    pages = paged(batch, 16, "NZ")
    result = attend_pages(batch, pages, 16, sparse_mode=3, atten_mask=causal_mask())
    _check(result, batch, reference(batch, causal=True))
    assert not result[:2].cpu().any()


@pytest.mark.parametrize("block_size", [16, 32, 128])
def test_doubled_planes(block_size: int) -> None:
    """K and V of a page lie behind one another; block ids double, nothing is copied."""
    batch = make_batch(MIXED, 4, 2, 64)
    pages = paged(batch, block_size, "NZ")
    planes = torch.stack((pages.key, pages.value), 1).flatten(0, 1)  # [2 blocks, N, D/C0, bs, C0]
    doubled = type(pages)(planes[:-1], planes[1:], pages.table * 2)
    result = attend_pages(batch, doubled, block_size, sparse_mode=3, atten_mask=causal_mask())
    _check(result, batch, reference(batch, causal=True))


@pytest.mark.parametrize("layout", ["BSH", "BSND", "BNSD", "BNSD_BSND"])
def test_batches_without_pages(layout: str) -> None:
    import torch_npu

    batch = make_batch([(6, 24), (6, 24)], 4, 2, 64)
    expected = torch.stack(reference(batch, causal=True))  # [B, N, S, D]

    def arrange(tensors: list[torch.Tensor]) -> torch.Tensor:
        stacked = torch.stack(tensors)
        if layout.startswith("BNSD"):
            return stacked
        rows = stacked.transpose(1, 2).contiguous()
        return rows.flatten(2) if layout == "BSH" else rows

    result, _ = torch_npu.npu_fused_infer_attention_score(
        *(arrange(each).npu() for each in (batch.queries, batch.keys, batch.values)),
        atten_mask=causal_mask(),
        input_layout=layout,
        num_heads=4,
        num_key_value_heads=2,
        scale=batch.scale,
        sparse_mode=3,
    )
    found = result.cpu().double()
    if layout == "BSH":
        found = found.unflatten(-1, (4, 64))
    if layout != "BNSD":
        found = found.transpose(1, 2)
    torch.testing.assert_close(found, expected, atol=2**-7, rtol=2**-7)


def test_flat_batch_without_pages() -> None:
    import torch_npu

    batch = make_batch(MIXED, 4, 2, 128)
    keys = torch.tensor(batch.kv_lengths).cumsum(0).tolist()
    result, _ = torch_npu.npu_fused_infer_attention_score(
        *(batch.flat(each).npu() for each in (batch.queries, batch.keys, batch.values)),
        atten_mask=causal_mask(),
        input_layout="TND",
        actual_seq_lengths=batch.cumulated,
        actual_seq_lengths_kv=keys,
        num_heads=4,
        num_key_value_heads=2,
        scale=batch.scale,
        sparse_mode=3,
    )
    _check(result, batch, reference(batch, causal=True))


def test_full_mask() -> None:
    import torch_npu

    batch = make_batch([(5, 20), (5, 20)], 2, 2, 64)
    mask = torch.rand(2, 1, 5, 20, generator=torch.Generator().manual_seed(4)) > 0.5
    result, _ = torch_npu.npu_fused_infer_attention_score(
        *(torch.stack(each).npu() for each in (batch.queries, batch.keys, batch.values)),
        atten_mask=mask.npu(),
        input_layout="BNSD",
        num_heads=2,
        scale=batch.scale,
    )
    scores = torch.stack(batch.queries).double() @ torch.stack(batch.keys).double().transpose(
        -1, -2
    )
    weights = (scores * batch.scale).masked_fill(mask, -torch.inf).softmax(-1).nan_to_num(0.0)
    expected = weights @ torch.stack(batch.values).double()
    torch.testing.assert_close(result.cpu().double(), expected, atol=2**-7, rtol=2**-7)


def test_sinks() -> None:
    import torch_npu

    batch = make_batch(MIXED, 4, 2, 64)
    pages, sink = paged(batch, 16, "NZ"), normal(4, seed=11)
    result, _ = torch_npu.npu_fused_infer_attention_score_v2(
        *(batch.flat(batch.queries).npu(), pages.key, pages.value),
        atten_mask=causal_mask(),
        actual_seq_qlen=batch.cumulated,
        actual_seq_kvlen=batch.kv_lengths,
        block_table=pages.table,
        learnable_sink=sink.npu(),
        num_query_heads=4,
        num_key_value_heads=2,
        softmax_scale=batch.scale,
        input_layout="TND",
        sparse_mode=3,
        block_size=16,
    )
    _check(result, batch, reference(batch, causal=True, sink=sink))


def test_logarithms_of_the_sums() -> None:
    import torch_npu

    batch = make_batch([(3, 20), (2, 9)], 4, 2, 64)
    pages = paged(batch, 16, "NZ")
    _, lse = torch_npu.npu_fused_infer_attention_score(
        *(batch.flat(batch.queries).npu(), pages.key, pages.value),
        block_table=pages.table,
        input_layout="TND",
        block_size=16,
        actual_seq_lengths=batch.cumulated,
        actual_seq_lengths_kv=batch.kv_lengths,
        num_heads=4,
        num_key_value_heads=2,
        scale=batch.scale,
        softmax_lse_flag=True,
    )
    rows = []
    for query, key in zip(batch.queries, batch.keys, strict=True):
        wide = key.double().repeat_interleave(2, 0).transpose(1, 2)
        rows.append((query.double() @ wide * batch.scale).logsumexp(-1).t())
    expected = torch.cat(rows)[..., None]
    torch.testing.assert_close(lse.cpu().double(), expected, atol=1e-4, rtol=1e-4)


def test_workspace_and_out() -> None:
    import torch_npu

    batch = make_batch([(1, 20), (1, 40)], 4, 2, 64)
    pages = paged(batch, 16, "NZ")
    query = batch.flat(batch.queries).npu()
    arguments: dict[str, Any] = {
        "block_table": pages.table,
        "input_layout": "TND",
        "block_size": 16,
        "actual_seq_lengths": batch.cumulated,
        "actual_seq_lengths_kv": batch.kv_lengths,
        "num_heads": 4,
        "num_key_value_heads": 2,
        "scale": batch.scale,
    }
    workspace = torch_npu._npu_fused_infer_attention_score_get_max_workspace(
        *(query, pages.key, pages.value), **arguments
    )
    out, lse = torch.empty_like(query), torch.empty(1, dtype=query.dtype, device="npu")
    torch.ops.npu.npu_fused_infer_attention_score.out(
        *(query, pages.key, pages.value), **arguments, workspace=workspace, out=[out, lse]
    )
    _check(out, batch, reference(batch))


def test_workspace_of_the_second_version() -> None:
    import torch_npu

    batch = make_batch([(1, 20)], 4, 2, 64)
    pages = paged(batch, 16, "NZ")
    workspace = torch_npu._npu_fused_infer_attention_score_v2_get_max_workspace(
        *(batch.flat(batch.queries).npu(), pages.key, pages.value),
        actual_seq_qlen=[1],
        actual_seq_kvlen=[20],
        block_table=pages.table,
        num_query_heads=4,
        num_key_value_heads=2,
        input_layout="TND",
        block_size=16,
    )
    assert workspace.numel()


def _quantised(tensors: list[torch.Tensor], dims: tuple[int, ...]) -> tuple[Any, Any]:
    """Codes and scales, the largest over ``dims`` of ``[heads, tokens, D]`` (and all requests)."""
    joined = torch.cat([each.float() for each in tensors], 1)
    scales = joined.abs().amax(dims, keepdim=True).expand(joined.shape) / 127
    codes = (joined / scales).round().to(torch.int8)
    sizes = [each.shape[1] for each in tensors]
    return list(codes.split(sizes, 1)), list(scales.split(sizes, 1))


@pytest.mark.parametrize("tokens", [1, 4])
@pytest.mark.parametrize("mode", [0, 1])
def test_int8_nz(tokens: int, mode: int) -> None:
    batch = make_batch([(tokens, 200), (tokens, 40)], 10, 1, 128)
    codes, scales = {}, {}
    for name, tensors in (("key", batch.keys), ("value", batch.values)):
        # One scale per channel, or per token for all heads.
        codes[name], scales[name] = _quantised(tensors, (1,) if mode == 0 else (0, 2))
    if mode == 0:
        scales = {n: [each.bfloat16().float() for each in s] for n, s in scales.items()}
    restored = {
        name: [c.float() * s for c, s in zip(codes[name], scales[name], strict=True)]
        for name in codes
    }
    expected = reference(
        Batch(batch.queries, restored["key"], restored["value"]), causal=tokens > 1
    )
    pages = paged(Batch(batch.queries, codes["key"], codes["value"]), 128, "NZ")

    def scale(name: str) -> torch.Tensor:
        if mode == 0:
            return scales[name][0][:, 0].bfloat16().npu()  # [kv_heads, D]
        padded = torch.zeros(2, 256)
        for request, each in enumerate(scales[name]):
            padded[request, : each.shape[1]] = each[0, :, 0]
        return padded.npu()

    import torch_npu

    result, _ = torch_npu.npu_fused_infer_attention_score(
        *(torch.stack(batch.queries).transpose(1, 2).contiguous().npu(), pages.key, pages.value),
        key_antiquant_scale=scale("key"),
        value_antiquant_scale=scale("value"),
        key_antiquant_mode=mode,
        value_antiquant_mode=mode,
        block_table=pages.table,
        block_size=128,
        input_layout="BSND",
        actual_seq_lengths_kv=batch.kv_lengths,
        num_heads=10,
        num_key_value_heads=1,
        scale=batch.scale,
        inner_precise=1,
        **({"sparse_mode": 3, "atten_mask": causal_mask()} if tokens > 1 else {}),
    )
    found = result.cpu().double().transpose(1, 2)
    torch.testing.assert_close(found, torch.stack(expected), atol=2**-7, rtol=2**-7)


def test_int8_with_scales_in_pages() -> None:
    """Mode 5: a scale per token and head, in pages of its own, through the same block table."""
    batch = make_batch([(1, 200), (1, 40)], 4, 2, 128)
    codes, scales = {}, {}
    for name, tensors in (("key", batch.keys), ("value", batch.values)):
        codes[name], scales[name] = _quantised(tensors, (2,))
    restored = {
        name: [c.float() * s for c, s in zip(codes[name], scales[name], strict=True)]
        for name in codes
    }
    expected = reference(Batch(batch.queries, restored["key"], restored["value"]))
    pages = paged(Batch(batch.queries, codes["key"], codes["value"]), 32, "BnNBsD")
    single = [[each[..., :1] for each in scales[name]] for name in ("key", "value")]
    scale_pages = paged(Batch(batch.queries, *single), 32, "BnNBsD")

    import torch_npu

    result, _ = torch_npu.npu_fused_infer_attention_score(
        *(torch.stack(batch.queries).npu(), pages.key, pages.value),
        key_antiquant_scale=scale_pages.key[..., 0].contiguous(),
        value_antiquant_scale=scale_pages.value[..., 0].contiguous(),
        key_antiquant_mode=5,
        value_antiquant_mode=5,
        block_table=pages.table,
        block_size=32,
        input_layout="BNSD",
        actual_seq_lengths_kv=batch.kv_lengths,
        num_heads=4,
        num_key_value_heads=2,
        scale=batch.scale,
    )
    torch.testing.assert_close(result.cpu().double(), torch.stack(expected), atol=2**-7, rtol=2**-7)


def test_block_table_outside_the_cache_is_an_error() -> None:
    """Hardware would read what lies there; the simulator says so when it computes."""
    from ascend_plugin.ops.sim.operators import attention
    from ascend_plugin.ops.sim.operators.attention_call import _NAMES

    pages, query = torch.zeros(3, 2, 4, 16, 16), torch.zeros(1, 4, 64)
    given = {
        "query": query,
        "keys": [pages],
        "values": [pages],
        "actual_seq_lengths": [1],
        "actual_seq_lengths_kv": [20],
        "block_table": torch.tensor([[0, 7]]),
        "block_size": 16,
        "input_layout": b"TND",
        "num_heads": 4,
        "num_key_value_heads": 2,
        "attention_out": query,
    }
    with pytest.raises(IndexError, match=r"requests \[0\] names \[0, 7\]; allowed: 0 to 2"):
        attention._compute(3, *(given.get(name) for name in _NAMES[3]))
