"""The attention backend of the CPU, called as vLLM's layers and runner call it."""

from __future__ import annotations

import pytest
import torch
from attention_cases import Batch, Case, assert_close, make_batch, oracle
from vllm.v1.attention.backend import AttentionType, CommonAttentionMetadata

from ascend_plugin.attention.cpu import (
    AscendCPUAttentionBackend,
    AscendCPUAttentionImpl,
    AscendCPUMetadata,
    AscendCPUMetadataBuilder,
)

CASE = Case(((1, 30), (9, 44), (4, 4)), heads=6, kv_heads=2, block_size=16, padding=5)


def _impl(case: Case = CASE, **more: object) -> AscendCPUAttentionImpl:
    return AscendCPUAttentionImpl(
        case.heads, case.head_dim, case.head_dim**-0.5, case.kv_heads, **more
    )


def _metadata(batch: Batch) -> AscendCPUMetadata:
    return AscendCPUMetadata(
        num_actual_tokens=int(batch.query_start_loc[-1]),
        query_start_loc=batch.query_start_loc,
        seq_lens=batch.seq_lens,
        block_table=batch.block_table,
        causal=True,
    )


def _forward(impl: AscendCPUAttentionImpl, batch: Batch) -> torch.Tensor:
    nothing = torch.empty(0)
    return impl.forward(
        None, batch.query, nothing, nothing, batch.pages, _metadata(batch), batch.out
    )


def test_forward_leaves_padding_alone() -> None:
    batch = make_batch(CASE)
    assert _forward(_impl(), batch) is batch.out
    assert_close(batch)


@pytest.mark.parametrize(
    ("options", "change"),
    [
        ({"sliding_window": 7}, {"window": 7}),
        ({"logits_soft_cap": 0.6}, {"soft_cap": 0.6}),
        ({"alibi_slopes": [2.0**-i for i in range(1, 7)]}, {"alibi": True}),
        ({"sliding_window": None, "logits_soft_cap": None}, {}),
    ],
    ids=str,
)
def test_options_of_a_layer_reach_the_operator(options: dict, change: dict) -> None:
    case = Case(((1, 30), (9, 44)), heads=6, kv_heads=2, **change)
    batch = make_batch(case)
    _forward(_impl(case, **options), batch)
    assert_close(batch)


def test_loaded_sinks_are_converted() -> None:
    case = Case(((1, 30), (9, 44)), heads=6, kv_heads=2, sinks=True)
    batch = make_batch(case)
    narrow = batch.options["sinks"].to(torch.bfloat16)
    batch.options["sinks"] = narrow.float()
    impl = _impl(case, sinks=torch.nn.Parameter(narrow, requires_grad=False))
    impl.process_weights_after_loading(torch.bfloat16)
    _forward(impl, batch)
    assert_close(batch, oracle(batch))


def test_update_then_forward() -> None:
    batch = make_batch(CASE)
    impl = _impl()
    pages = torch.full_like(batch.pages, float("nan"))
    for i, (_, length) in enumerate(CASE.sequences):
        token = torch.arange(length)
        slots = batch.block_table[i, token // 16].long() * 16 + token % 16
        key, value = batch.keys[i], batch.values[i]
        # The runner pads keys beyond the slots, and slots beyond the keys.
        padded = torch.cat([key, torch.ones_like(key[:3])])
        impl.do_kv_cache_update(None, padded, torch.cat([value, value[:3]]), pages, slots)
        slots = torch.cat([slots, torch.full((4,), -1)])
        impl.do_kv_cache_update(None, key, value, pages, slots)
    batch.pages = pages
    _forward(impl, batch)
    assert_close(batch)


def test_profiling_runs_without_pages() -> None:
    out = torch.full((3, 6, 64), 7.0)
    nothing = torch.empty(0)
    got = _impl().forward(None, torch.ones(3, 6, 64), nothing, nothing, nothing, None, out)
    assert got is out
    assert int(out.count_nonzero()) == 0


@pytest.mark.parametrize("name", ["output_scale", "output_block_scale"])
def test_quantised_output_is_refused(name: str) -> None:
    batch = make_batch(CASE)
    tensors = (batch.query, batch.query, batch.query, batch.pages, _metadata(batch), batch.out)
    with pytest.raises(ValueError, match="does not quantise its output"):
        _impl().forward(None, *tensors, **{name: torch.ones(1)})


@pytest.mark.parametrize(
    "kind", [AttentionType.ENCODER, AttentionType.ENCODER_ONLY, AttentionType.ENCODER_DECODER]
)
def test_other_kinds_of_attention_are_refused(kind: AttentionType) -> None:
    with pytest.raises(ValueError, match=r"attention type .* allowed is 'decoder'.*CPU_ATTN"):
        _impl(attn_type=kind)


def test_head_dimensions_that_pages_cannot_hold_are_refused() -> None:
    with pytest.raises(ValueError, match="head dimension 72 is not supported"):
        AscendCPUAttentionImpl(4, 72, 1.0, 2)


def test_without_kv_heads_every_head_has_its_own() -> None:
    assert AscendCPUAttentionImpl(4, 64, 1.0).num_kv_heads == 4


def _common(batch: Batch, causal: object) -> CommonAttentionMetadata:
    count = len(batch.case.sequences)
    return CommonAttentionMetadata(
        query_start_loc=batch.query_start_loc,
        query_start_loc_cpu=batch.query_start_loc,
        seq_lens=batch.seq_lens,
        num_reqs=count - 1,  # the last sequence stands for padding
        num_actual_tokens=int(batch.query_start_loc[count - 1]),
        max_query_len=9,
        max_seq_len=44,
        block_table_tensor=batch.block_table,
        slot_mapping=torch.zeros(1, dtype=torch.int64),
        causal=causal,
    )


def test_a_builder_passes_the_batch_without_its_padding() -> None:
    batch = make_batch(CASE)
    builder = AscendCPUMetadataBuilder.__new__(AscendCPUMetadataBuilder)
    for causal in (True, False):
        built = builder.build(0, _common(batch, causal))
        assert built.causal is causal
        assert built.num_actual_tokens == 10
        assert torch.equal(built.query_start_loc, batch.query_start_loc[:3])
        assert torch.equal(built.seq_lens, batch.seq_lens[:2])
        assert torch.equal(built.block_table, batch.block_table[:2])


def test_a_batch_of_mixed_causality_is_refused() -> None:
    builder = AscendCPUMetadataBuilder.__new__(AscendCPUMetadataBuilder)
    causal = torch.tensor([True, False])
    with pytest.raises(ValueError, match=r"mixes causal and bidirectional.*CPU_ATTN"):
        builder.build(0, _common(make_batch(CASE), causal))


def test_the_backend_names_its_parts() -> None:
    assert AscendCPUAttentionBackend.get_impl_cls() is AscendCPUAttentionImpl
    assert AscendCPUAttentionBackend.get_builder_cls() is AscendCPUMetadataBuilder
    assert AscendCPUAttentionBackend.forward_includes_kv_cache_update is False
