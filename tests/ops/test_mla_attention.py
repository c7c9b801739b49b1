"""``mla_attention``: every implementation against a float64 oracle, and what it refuses."""

from __future__ import annotations

import dataclasses
from concurrent.futures import ThreadPoolExecutor

import paging
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from implementations import threads
from latent_cases import LatentBatch, LatentCase, assert_close, make_batch, oracle
from strategies import BLOCK_SIZES, DTYPES, sequences

from ascend_plugin.ops.mla_attention import mla_attention, reference

DECODE = ((1, 1), (1, 16), (1, 17), (1, 100), (1, 700))
VERIFY = ((2, 2), (16, 300), (3, 33), (8, 129), (4, 16))
CHUNKS = ((33, 33), (20, 97), (1, 50), (0, 40), (17, 350), (5, 64))
VARIANTS = ("", "c8d", "c8s")


@st.composite
def latent_cases(draw: st.DrawFn) -> LatentCase:
    """Everything that the operator documents, in any combination."""
    variant = draw(st.sampled_from(VARIANTS))
    return LatentCase(
        sequences=draw(sequences()),
        heads=draw(st.sampled_from((1, 2, 3, 8, 16, 20, 128))),
        latent_dim=draw(st.sampled_from((16, 32, 48, 64, 80, 256, 512))),
        rotary_dim=draw(st.sampled_from((16, 32, 48, 64, 128))),
        block_size=draw(st.sampled_from(BLOCK_SIZES)),
        dtype=draw(st.sampled_from(DTYPES)),
        page_dtype=draw(st.sampled_from(DTYPES)),
        variant=variant,
        causal=draw(st.booleans()),
        interleaved=draw(st.booleans()),
        strided=draw(st.booleans()),
        padding=draw(st.integers(0, 3)),
        fast=bool(variant) and draw(st.booleans()),
        seed=draw(st.integers(0, 2**16)),
    )


@given(case=latent_cases(), count=st.sampled_from((1, 2, 3)))
@settings(max_examples=80)
@example(LatentCase(CHUNKS, heads=16, latent_dim=512, rotary_dim=64, block_size=256), 1)
def test_any_batch_equals_the_oracle(implementation: str, case: LatentCase, count: int) -> None:
    batch = make_batch(case)
    with threads(count):
        batch.run()
    assert_close(batch)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rows", [DECODE, VERIFY, CHUNKS], ids=["decode", "verify", "chunks"])
def test_the_shape_of_deepseek(
    implementation: str, dtype: torch.dtype, rows: tuple, variant: str
) -> None:
    shape = {"heads": 16, "latent_dim": 512, "rotary_dim": 64, "block_size": 128}
    batch = make_batch(LatentCase(rows, dtype=dtype, variant=variant, **shape))
    batch.run()
    assert_close(batch)


@pytest.mark.parametrize("rows", range(1, 17))
def test_verification_of_drafts(implementation: str, rows: int) -> None:
    for variant in ("", "c8d"):
        case = LatentCase(((rows, 200), (rows, rows), (1, 77)), heads=16, variant=variant)
        batch = make_batch(case)
        batch.run()
        assert_close(batch)


@pytest.mark.parametrize("heads", [1, 5, 16, 17, 32, 40, 128])
def test_head_counts(implementation: str, heads: int) -> None:
    for variant, dtype in (("", torch.float32), ("c8s", torch.bfloat16), ("", torch.bfloat16)):
        batch = make_batch(
            LatentCase((*DECODE, *VERIFY), heads=heads, variant=variant, dtype=dtype)
        )
        batch.run()
        assert_close(batch)


@pytest.mark.parametrize("page_dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_query_and_page_types_mix(
    implementation: str, dtype: torch.dtype, page_dtype: torch.dtype
) -> None:
    rows = (*DECODE, *VERIFY, *CHUNKS)
    batch = make_batch(LatentCase(rows, dtype=dtype, page_dtype=page_dtype, latent_dim=80))
    batch.run()
    assert_close(batch)


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("variant", VARIANTS)
def test_memory_orders_and_strides(implementation: str, variant: str, interleaved: bool) -> None:
    rows = (*VERIFY, *CHUNKS)
    case = LatentCase(
        rows, variant=variant, interleaved=interleaved, strided=True, padding=3, heads=6
    )
    batch = make_batch(case)
    assert not batch.query.is_contiguous()
    before = paging.storage(batch.out).clone().view(batch.query.shape[0], 7, -1)
    batch.run()
    assert_close(batch)
    around = paging.storage(batch.out).view_as(before)
    assert torch.equal(around[:, 0], before[:, 0])
    assert torch.equal(around[..., :16], before[..., :16]), "memory between rows was written"


@pytest.mark.parametrize("variant", VARIANTS)
def test_nothing_but_out_changes(implementation: str, variant: str) -> None:
    batch = make_batch(LatentCase(CHUNKS, dtype=torch.bfloat16, variant=variant, strided=True))
    inputs = [batch.query_start_loc, batch.seq_lens, batch.block_table]
    tensors = (batch.query, batch.query_rotary, batch.pages)
    before = [tensor.clone() for tensor in inputs]
    bits = [paging.bits(paging.storage(tensor)) for tensor in tensors]
    batch.run()
    assert all(torch.equal(*pair) for pair in zip(inputs, before, strict=True))
    for tensor, known in zip(tensors, bits, strict=True):
        assert torch.equal(paging.bits(paging.storage(tensor)), known)


def test_rows_that_see_no_token_become_zero(implementation: str) -> None:
    # Two rows of a sequence without tokens, and five rows of one that has three.
    for variant in VARIANTS:
        batch = make_batch(LatentCase(((2, 0), (5, 3), (1, 8)), variant=variant))
        batch.run()
        assert bool((batch.out[:4] == 0).all())
        assert_close(batch)


@pytest.mark.parametrize("padding", [0, 4])
def test_empty_batches(implementation: str, padding: int) -> None:
    for rows in ((), ((0, 0),), ((0, 9), (0, 0))):
        batch = make_batch(LatentCase(rows, padding=padding))
        batch.run()
        assert bool((batch.out == 7.0).all())


@pytest.mark.parametrize("count", [1, 2, 5])
@pytest.mark.parametrize("variant", VARIANTS)
def test_thread_counts(implementation: str, count: int, variant: str) -> None:
    # Long enough for the kernels to split a sequence between threads, and to merge the parts.
    for rows in (((1, 3000),), ((4, 2100), (1, 5)), ((30, 1900),), CHUNKS):
        case = LatentCase(rows, heads=16, dtype=torch.bfloat16, block_size=64, variant=variant)
        batch = make_batch(case)
        with threads(count):
            batch.run()
        assert_close(batch)


def test_calls_from_several_threads_at_once(implementation: str) -> None:
    batches = [
        make_batch(LatentCase(rows, seed=seed, heads=6, dtype=torch.bfloat16, variant=variant))
        for seed, rows in enumerate((DECODE, VERIFY, CHUNKS))
        for variant in VARIANTS
        for _ in range(3)
    ]
    with threads(2), ThreadPoolExecutor(4) as pool:
        list(pool.map(LatentBatch.run, batches))
    for batch in batches:
        assert_close(batch)


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_bad_sequence_does_not_change_the_answer_to_another(
    implementation: str, variant: str
) -> None:
    case = LatentCase(((1, 40), (6, 50)), variant=variant, dtype=torch.bfloat16)
    clean, poisoned = make_batch(case), make_batch(case)
    # A rotary part of NaN in the first block of the first sequence.
    block = poisoned.block_table[0, 0].item()
    page = case.page
    start = page.layout().rotary_offset // page.dtype.itemsize
    nbytes = case.block_size * case.rotary_dim * page.rotary_dtype.itemsize
    flat = poisoned.pages[block].reshape(-1)
    flat[start : start + nbytes // page.dtype.itemsize] = (
        -1 if variant else float("nan")  # 0xffff is NaN
    )
    poisoned.pages[block] = flat.view_as(poisoned.pages[block])
    clean.run()
    poisoned.run()
    assert bool(poisoned.out[0].isnan().all())
    assert torch.equal(poisoned.out[1:], clean.out[1:])


def test_a_query_that_is_not_finite_gives_nan(implementation: str) -> None:
    for variant in VARIANTS:
        batch = make_batch(LatentCase(((1, 40), (1, 50)), variant=variant, dtype=torch.bfloat16))
        want = oracle(batch)
        batch.query[0, 1, 3] = float("nan")
        batch.run()
        want[0, 1] = float("nan")
        assert_close(batch, want)


@pytest.mark.parametrize("where", [0, 2])
@pytest.mark.parametrize("bad", [-1, 0, 10_000, 2**31 - 1])
def test_block_ids_outside_the_pages_are_refused(implementation: str, bad: int, where: int) -> None:
    batch = make_batch(LatentCase(((1, 40), (20, 50), (3, 33))))
    batch.block_table[where, 1] = bad or batch.pages.shape[0]  # 0: the first that does not exist
    with pytest.raises(ValueError, match=r"block.* outside.*\d+"):
        batch.run()
    assert bool((batch.out == 7.0).all()), "out was written although the call was refused"


@given(case=latent_cases())
@settings(max_examples=40)
def test_the_reference_in_float64_is_the_oracle(case: LatentCase) -> None:
    wide = dataclasses.replace(case, dtype=torch.float32)
    batch = make_batch(wide)
    out = torch.zeros(batch.query.shape, dtype=torch.float64)
    arguments = list(batch.arguments())
    arguments[3] = out
    reference.mla_attention(*arguments, **batch.options, compute_dtype=torch.float64)
    inside = int(batch.query_start_loc[-1])
    torch.testing.assert_close(out[:inside], oracle(batch)[:inside], atol=1e-12, rtol=1e-12)


def test_through_the_dispatcher_and_compiled(implementation: str) -> None:
    case = LatentCase((*DECODE, *CHUNKS), variant="c8d")
    for call in (torch.ops.ascend_plugin.mla_attention, torch.compile(mla_attention)):
        batch = make_batch(case)
        call(*batch.arguments(), **batch.options)
        assert_close(batch)


@pytest.mark.parametrize("variant", VARIANTS)
def test_opcheck(implementation: str, variant: str) -> None:
    batch = make_batch(LatentCase(((1, 20), (5, 40)), variant=variant, interleaved=True))
    *tensors, layout = batch.arguments()
    torch.library.opcheck(
        torch.ops.ascend_plugin.mla_attention.default,
        (*tensors, list(layout)),
        batch.options,
    )
