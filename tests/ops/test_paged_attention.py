"""``paged_attention``: every implementation against a float64 oracle, and what it refuses."""

from __future__ import annotations

import dataclasses
from concurrent.futures import ThreadPoolExecutor

import paging
import pytest
import torch
from attention_cases import SCORE_OPTIONS, Batch, Case, assert_close, make_batch, oracle
from hypothesis import example, given, settings
from hypothesis import strategies as st
from implementations import threads
from strategies import DTYPES, HEAD_DIMS, attention_cases

from ascend_plugin.ops.paged_attention import paged_attention, reference

DECODE = ((1, 1), (1, 16), (1, 17), (1, 100), (1, 700))
VERIFY = ((2, 2), (16, 300), (3, 33), (8, 129), (4, 16))
CHUNKS = ((33, 33), (20, 97), (1, 50), (0, 40), (17, 350), (5, 64))
EVERYTHING = {"window": 40, "soft_cap": 5.0, "alibi": True, "sinks": True}


@given(case=attention_cases(), count=st.sampled_from((1, 2, 3)))
@settings(max_examples=120)
@example(Case(CHUNKS, heads=16, kv_heads=1, head_dim=256, block_size=256, **EVERYTHING), 1)
def test_any_batch_equals_the_oracle(implementation: str, case: Case, count: int) -> None:
    batch = make_batch(case)
    with threads(count):
        batch.run()
    assert_close(batch)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("sequences", [DECODE, VERIFY, CHUNKS], ids=["decode", "verify", "chunks"])
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_head_dims(implementation: str, dtype: torch.dtype, sequences, head_dim: int) -> None:
    batch = make_batch(Case(sequences, head_dim=head_dim, dtype=dtype, block_size=32))
    batch.run()
    assert_close(batch)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("block_size", range(16, 257, 16))
def test_block_sizes(implementation: str, dtype: torch.dtype, block_size: int) -> None:
    batch = make_batch(Case((*DECODE, *CHUNKS), dtype=dtype, block_size=block_size))
    batch.run()
    assert_close(batch)


@pytest.mark.parametrize("group", range(1, 17))
def test_head_groups(implementation: str, group: int) -> None:
    batch = make_batch(Case((*DECODE, *VERIFY), heads=2 * group, kv_heads=2))
    batch.run()
    assert_close(batch)


@pytest.mark.parametrize("page_dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_query_and_page_types_mix(
    implementation: str, dtype: torch.dtype, page_dtype: torch.dtype
) -> None:
    sequences = (*DECODE, *VERIFY, *CHUNKS)
    batch = make_batch(Case(sequences, dtype=dtype, page_dtype=page_dtype, head_dim=80))
    batch.run()
    assert_close(batch)


@pytest.mark.parametrize("change", [*SCORE_OPTIONS, EVERYTHING], ids=str)
def test_score_options(implementation: str, change: dict) -> None:
    sequences = (*DECODE, *VERIFY, *CHUNKS)
    batch = make_batch(Case(sequences, heads=6, kv_heads=2, block_size=32, **change))
    plain = make_batch(Case(sequences, heads=6, kv_heads=2, block_size=32))
    batch.run()
    assert_close(batch)
    if change != {"window": 10_000}:
        plain.run()
        assert not torch.allclose(batch.out, plain.out, atol=1e-3), "the option changes nothing"


@pytest.mark.parametrize("order", paging.ORDERS)
def test_memory_orders_and_strides(implementation: str, order: str) -> None:
    case = Case((*VERIFY, *CHUNKS), order=order, strided=True, padding=3, kv_heads=2, heads=6)
    batch = make_batch(case)
    assert not batch.query.is_contiguous()
    before = paging.storage(batch.out).clone().view(batch.query.shape[0], -1, case.head_dim)
    batch.run()
    assert_close(batch)
    around = paging.storage(batch.out).view_as(before)[:, :2]
    assert torch.equal(around, before[:, :2]), "memory between the rows of out was written"


def test_nothing_but_out_changes(implementation: str) -> None:
    batch = make_batch(Case(CHUNKS, dtype=torch.bfloat16, strided=True, **EVERYTHING))
    inputs = [batch.query_start_loc, batch.seq_lens, batch.block_table]
    before = [tensor.clone() for tensor in inputs]
    query, pages = (paging.bits(paging.storage(t)) for t in (batch.query, batch.pages))
    batch.run()
    assert all(torch.equal(*pair) for pair in zip(inputs, before, strict=True))
    assert torch.equal(paging.bits(paging.storage(batch.query)), query)
    assert torch.equal(paging.bits(paging.storage(batch.pages)), pages)


@pytest.mark.parametrize("sinks", [False, True])
def test_rows_that_see_no_token_become_zero(implementation: str, sinks: bool) -> None:
    # Two rows of a sequence without tokens, and five rows of one that has three.
    batch = make_batch(Case(((2, 0), (5, 3), (1, 8)), sinks=sinks))
    batch.run()
    assert bool((batch.out[:4] == 0).all())
    assert_close(batch)


@pytest.mark.parametrize("padding", [0, 4])
def test_empty_batches(implementation: str, padding: int) -> None:
    for sequences in ((), ((0, 0),), ((0, 9), (0, 0))):
        batch = make_batch(Case(sequences, padding=padding))
        batch.run()
        assert_close(batch)


@pytest.mark.parametrize("count", [1, 2, 5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_thread_counts(implementation: str, count: int, dtype: torch.dtype) -> None:
    # Long enough for the kernels to split a sequence between threads, and to merge the parts.
    for sequences in (((1, 3000),), ((4, 2100), (1, 5)), ((30, 1900),), CHUNKS):
        for options in ({}, EVERYTHING | {"window": 0}):
            case = Case(sequences, kv_heads=2, heads=6, dtype=dtype, block_size=64, **options)
            batch = make_batch(case)
            with threads(count):
                batch.run()
            assert_close(batch)


def test_calls_from_several_threads_at_once(implementation: str) -> None:
    cases = [
        Case(sequences, seed=seed, heads=6, dtype=dtype)
        for seed, sequences in enumerate((DECODE, VERIFY, CHUNKS, ((1, 1500), (3, 900))))
        for dtype in (torch.float32, torch.bfloat16)
    ]
    batches = [make_batch(case) for case in cases for _ in range(5)]
    with threads(2), ThreadPoolExecutor(4) as pool:
        list(pool.map(Batch.run, batches))
    for batch in batches:
        assert_close(batch)


def test_large_scores_do_not_overflow(implementation: str) -> None:
    # Scores of a few hundred, whose float32 rounding shows in the weights.
    batch = make_batch(Case((*DECODE, *CHUNKS), scale=12.0))
    batch.run()
    assert_close(batch, tolerance=(5e-4, 5e-4))


def test_a_bad_sequence_does_not_change_the_answer_to_another(implementation: str) -> None:
    case = Case(((1, 40), (6, 50)), block_size=16)
    clean, poisoned = make_batch(case), make_batch(case)
    block = poisoned.block_table[0, 0].item()
    poisoned.pages[block] = float("nan")
    clean.run()
    poisoned.run()
    assert bool(poisoned.out[0].isnan().all())
    assert torch.equal(poisoned.out[1:], clean.out[1:])


def test_blocks_can_be_shared_by_sequences(implementation: str) -> None:
    batch = make_batch(Case(((1, 48), (4, 48), (7, 41)), block_size=16))
    batch.block_table[1] = batch.block_table[0]
    batch.keys[1], batch.values[1] = batch.keys[0], batch.values[0]
    batch.run()
    assert_close(batch, oracle(batch))


@pytest.mark.parametrize("where", [0, 2])
@pytest.mark.parametrize("bad", [-1, 0, 10_000, 2**31 - 1])
def test_block_ids_outside_the_pages_are_refused(implementation: str, bad: int, where: int) -> None:
    batch = make_batch(Case(((1, 40), (20, 50), (3, 33))))
    batch.block_table[where, 1] = bad or batch.pages.shape[0]  # 0: the first that does not exist
    before = batch.out.clone()
    with pytest.raises(ValueError, match=r"block.* outside.*\d+"):
        batch.run()
    assert torch.equal(batch.out, before), "out was written although the call was refused"


@given(case=attention_cases())
@settings(max_examples=60)
def test_the_reference_in_float64_is_the_oracle(case: Case) -> None:
    wide = dataclasses.replace(case, dtype=torch.float32)
    batch = make_batch(wide)
    out = torch.zeros(batch.query.shape, dtype=torch.float64)
    arguments = list(batch.arguments())
    arguments[2] = out
    reference.paged_attention(*arguments, **batch.options, compute_dtype=torch.float64)
    inside = int(batch.query_start_loc[-1])
    torch.testing.assert_close(out[:inside], oracle(batch)[:inside], atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("window", [0, 20])
@pytest.mark.parametrize("heads", [2, 8])
def test_the_reference_is_torch_attention(heads: int, window: int) -> None:
    rows, length = 30, 90
    batch = make_batch(Case(((rows, length),), heads=heads, window=0))
    batch.options["window"] = window
    arguments = batch.arguments()
    reference.paged_attention(*arguments, **batch.options)
    position = torch.arange(length - rows, length)[:, None]
    token = torch.arange(length)
    mask = (token <= position) & ((token > position - window) if window else True)
    want = torch.nn.functional.scaled_dot_product_attention(
        batch.query.transpose(0, 1),
        batch.keys[0].transpose(0, 1),
        batch.values[0].transpose(0, 1),
        attn_mask=mask,
        enable_gqa=True,
    )
    torch.testing.assert_close(batch.out, want.transpose(0, 1), atol=1e-5, rtol=1e-5)


def test_through_the_dispatcher_and_compiled(implementation: str) -> None:
    case = Case((*DECODE, *CHUNKS), **EVERYTHING)
    for call in (torch.ops.ascend_plugin.paged_attention, torch.compile(paged_attention)):
        batch = make_batch(case)
        call(*batch.arguments(), **batch.options)
        assert_close(batch)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_opcheck(implementation: str, dtype: torch.dtype) -> None:
    batch = make_batch(Case(((1, 20), (5, 40)), dtype=dtype, order="BLHNC", **EVERYTHING))
    *tensors, layout = batch.arguments()
    torch.library.opcheck(
        torch.ops.ascend_plugin.paged_attention.default,
        (*tensors, list(layout)),
        batch.options,
    )
