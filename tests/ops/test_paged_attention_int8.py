"""``paged_attention`` over int8 pages: every implementation against the float64 oracle."""

from __future__ import annotations

import dataclasses
from concurrent.futures import ThreadPoolExecutor

import int8_pages
import paging
import pytest
import torch
from attention_cases import (
    SCORE_OPTIONS,
    Batch,
    Case,
    assert_close,
    int8_tolerance,
    make_batch,
    oracle,
    relative_error,
)
from hypothesis import example, given, settings
from hypothesis import strategies as st
from implementations import threads
from int8_pages import PATCHED, STATIC, VARIANTS, Int8
from strategies import DTYPES, HEAD_DIMS, attention_cases

from ascend_plugin.ops.paged_attention import paged_attention, reference

DECODE = ((1, 1), (1, 16), (1, 17), (1, 100), (1, 700))
VERIFY = ((2, 2), (16, 300), (3, 33), (8, 129), (4, 16))
CHUNKS = ((33, 33), (20, 97), (1, 50), (0, 40), (17, 350), (5, 64))
EVERYTHING = {"window": 40, "soft_cap": 5.0, "alibi": True, "sinks": True}

both_precisions = pytest.mark.parametrize("fast", [False, True], ids=["exact", "fast"])


@st.composite
def int8_cases(draw: st.DrawFn) -> Case:
    return dataclasses.replace(
        draw(attention_cases()),
        variant=draw(st.sampled_from(tuple(VARIANTS))),
        head_dim=draw(st.sampled_from((*HEAD_DIMS, 48))),
        fast=draw(st.booleans()),
        page_dtype=None,
    )


@given(case=int8_cases(), count=st.sampled_from((1, 2, 3)))
@settings(max_examples=120)
@example(
    Case(CHUNKS, heads=16, kv_heads=1, head_dim=256, block_size=256, variant="c8d", **EVERYTHING), 1
)
def test_any_batch_equals_the_oracle(implementation: str, case: Case, count: int) -> None:
    batch = make_batch(case)
    with threads(count):
        batch.run()
    assert_close(batch)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("head_dim", [*HEAD_DIMS, 48])
def test_head_dims(implementation: str, variant: str, head_dim: int) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        sequences = (*DECODE, *VERIFY, *CHUNKS)
        case = Case(sequences, dtype=dtype, head_dim=head_dim, block_size=32, variant=variant)
        for fast in (False, True):
            batch = make_batch(dataclasses.replace(case, fast=fast))
            batch.run()
            assert_close(batch)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("block_size", [16, 48, 80, 128, 208, 256])
def test_block_sizes(implementation: str, variant: str, block_size: int) -> None:
    case = Case((*DECODE, *CHUNKS), block_size=block_size, variant=variant, dtype=torch.bfloat16)
    batch = make_batch(case)
    batch.run()
    assert_close(batch)


@pytest.mark.parametrize("group", [*range(1, 10), 12, 16])
def test_head_groups(implementation: str, group: int) -> None:
    for variant in VARIANTS:
        case = Case((*DECODE, *VERIFY), heads=2 * group, kv_heads=2, variant=variant)
        for fast in (False, True):
            batch = make_batch(dataclasses.replace(case, fast=fast))
            batch.run()
            assert_close(batch)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("variant", VARIANTS)
def test_the_error_is_that_of_the_reference(
    implementation: str, variant: str, dtype: torch.dtype
) -> None:
    """Exact products hardly add to the error of the output's type.

    Prefill rounds queries to bfloat16 after they are rotated (C8D) or scaled (C8S).
    """
    batch = make_batch(Case((*DECODE, *VERIFY, *CHUNKS), dtype=dtype, variant=variant, head_dim=80))
    want = oracle(batch)
    plain = torch.full_like(batch.out, 7.0)
    arguments = list(batch.arguments())
    arguments[2] = plain
    reference.paged_attention(*arguments, **batch.options)
    batch.run()
    floor = 2e-4 if dtype == torch.float32 else 0.0
    assert relative_error(batch.out, want) <= max(1.4 * relative_error(plain, want), floor)


@pytest.mark.parametrize("change", [*SCORE_OPTIONS, EVERYTHING], ids=str)
@pytest.mark.parametrize("variant", VARIANTS)
def test_score_options(implementation: str, variant: str, change: dict) -> None:
    sequences = (*DECODE, *VERIFY, *CHUNKS)
    case = Case(sequences, heads=6, kv_heads=2, block_size=32, variant=variant)
    batch, plain = make_batch(dataclasses.replace(case, **change)), make_batch(case)
    batch.run()
    assert_close(batch)
    if change != {"window": 10_000}:
        plain.run()
        assert not torch.allclose(batch.out, plain.out, atol=1e-3), "the option changes nothing"


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("order", paging.ORDERS)
def test_memory_orders_and_strides(implementation: str, order: str, variant: str) -> None:
    sequences = (*VERIFY, *CHUNKS)
    case = Case(sequences, 6, 2, order=order, strided=True, padding=3, variant=variant)
    batch = make_batch(case)
    before = paging.storage(batch.out).clone().view(batch.query.shape[0], -1, case.head_dim)
    pages = paging.storage(batch.pages).clone()
    batch.run()
    assert_close(batch)
    around = paging.storage(batch.out).view_as(before)[:, :2]
    assert torch.equal(around, before[:, :2]), "memory between the rows of out was written"
    assert torch.equal(paging.storage(batch.pages), pages)


@both_precisions
@pytest.mark.parametrize("variant", PATCHED)
def test_patches_count(implementation: str, variant: str, fast: bool) -> None:
    """Without its patches the same page means something else, far beyond the tolerance."""
    batch = make_batch(Case((*DECODE, *VERIFY, *CHUNKS), variant=variant, fast=fast))
    batch.run()
    assert_close(batch)
    page = batch.case.page
    for block in range(batch.pages.shape[0]):
        for head in range(page.num_kv_heads):
            for name in "KV":
                int8_pages.array(batch.pages, page, block, head, f"{name} patch tags")[:] = 0
    bare = make_batch(batch.case)
    bare.pages = batch.pages
    bare.run()
    assert relative_error(bare.out, batch.out) > 5 * int8_tolerance(batch.case)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("count", [1, 2, 5])
@both_precisions
def test_thread_counts(implementation: str, count: int, variant: str, fast: bool) -> None:
    # Long enough for the kernels to split a sequence between threads, and to merge the parts.
    for sequences in (((1, 1500),), ((4, 1100), (1, 5)), ((30, 900),)):
        case = Case(
            sequences, 6, 2, dtype=torch.bfloat16, block_size=64, variant=variant, fast=fast
        )
        batch = make_batch(case)
        with threads(count):
            batch.run()
        assert_close(batch)


def test_calls_from_several_threads_at_once(implementation: str) -> None:
    cases = [
        Case(sequences, seed=seed, heads=6, variant=variant)
        for seed, sequences in enumerate((DECODE, VERIFY, CHUNKS, ((1, 1500), (3, 900))))
        for variant in VARIANTS
    ]
    batches = [make_batch(case) for case in cases for _ in range(3)]
    with threads(2), ThreadPoolExecutor(4) as pool:
        list(pool.map(Batch.run, batches))
    for batch in batches:
        assert_close(batch)


@pytest.mark.parametrize("variant", VARIANTS)
def test_rows_that_see_no_token_become_zero(implementation: str, variant: str) -> None:
    batch = make_batch(Case(((2, 0), (5, 3), (1, 8)), variant=variant))
    batch.run()
    assert bool((batch.out[:4] == 0).all())
    assert_close(batch)


@pytest.mark.parametrize("variant", VARIANTS)
def test_empty_batches(implementation: str, variant: str) -> None:
    for sequences in ((), ((0, 0),), ((0, 9), (0, 0))):
        batch = make_batch(Case(sequences, padding=4, variant=variant))
        batch.run()
        assert_close(batch)


def test_a_scale_that_is_nan_shows_in_its_sequence_alone(implementation: str) -> None:
    case = Case(((1, 40), (6, 50)), variant="c8d")
    clean, poisoned = make_batch(case), make_batch(case)
    block = int(poisoned.block_table[0, 1])
    for name in ("K scales", "V scales"):
        clean.run()
        poisoned = make_batch(case)
        int8_pages.array(poisoned.pages, case.page, block, 0, name)[3] = float("nan")
        poisoned.run()
        group = case.heads // case.kv_heads
        assert bool(poisoned.out[0, :group].isnan().all()), name
        assert torch.equal(poisoned.out[0, group:], clean.out[0, group:])
        assert torch.equal(poisoned.out[1:], clean.out[1:])


@pytest.mark.parametrize("variant", PATCHED)
def test_patches_of_tokens_that_are_not_visible_change_nothing(
    implementation: str, variant: str
) -> None:
    """A rejected draft's patch stays behind the last token, with whatever scale it had."""
    case = Case(((1, 21), (3, 37)), variant=variant, block_size=32, window=20)
    batch, other = make_batch(case), make_batch(case)
    page = case.page
    changed = 0
    for i, (rows, length) in enumerate(case.sequences):
        first = case.first_token(rows, length)
        for column in range(first // 32, -(-length // 32)):
            block = int(other.block_table[i, column])
            visible = range(first - 32 * column, length - 32 * column)
            for head in range(page.num_kv_heads):
                for name in "KV":
                    arrays = (
                        int8_pages.array(other.pages, page, block, head, f"{name} patch {part}")
                        for part in ("tags", "scales")
                    )
                    changed += _spoil(*arrays, set(visible))
    assert changed > 0
    batch.run()
    other.run()
    assert torch.equal(batch.out, other.out)


def _spoil(tags, scales, visible: set[int]) -> int:
    """Let every slot without a visible token hold the infinite patch of one that is not."""
    changed = 0
    for slot in range(tags.size):
        if int(tags[slot]) - 1 in visible and (tags[slot] - 1) % tags.size == slot:
            continue
        hidden = [t for t in range(slot, 32, tags.size) if t not in visible]
        if hidden:
            tags[slot], scales[slot] = hidden[-1] + 1, float("inf")
            changed += 1
    return changed


@pytest.mark.parametrize("variant", STATIC)
def test_channel_scales_belong_to_the_call(implementation: str, variant: str) -> None:
    """Two layers share a signature, but not their scales."""
    first = make_batch(Case((*DECODE, *VERIFY), variant=variant))
    second = make_batch(first.case)
    second.options["channel_scales"] = first.options["channel_scales"] * torch.tensor(
        [1.0, 2.0]
    ).view(2, 1, 1)
    second.values = [2 * value for value in second.values]
    for batch in (first, second):
        batch.run()
        assert_close(batch, oracle(batch))


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("bad", [-1, 10_000, 2**31 - 1])
def test_block_ids_outside_the_pages_are_refused(
    implementation: str, bad: int, variant: str
) -> None:
    batch = make_batch(Case(((1, 40), (20, 50), (3, 33)), variant=variant))
    batch.block_table[2, 1] = bad
    before = batch.out.clone()
    with pytest.raises(ValueError, match=r"block.* outside.*\d+"):
        batch.run()
    assert torch.equal(batch.out, before), "out was written although the call was refused"


@given(case=int8_cases())
@settings(max_examples=40)
def test_the_reference_in_float64_is_the_oracle(case: Case) -> None:
    batch = make_batch(dataclasses.replace(case, dtype=torch.float32))
    out = torch.zeros(batch.query.shape, dtype=torch.float64)
    arguments = list(batch.arguments())
    arguments[2] = out
    reference.paged_attention(*arguments, **batch.options, compute_dtype=torch.float64)
    inside = int(batch.query_start_loc[-1])
    torch.testing.assert_close(out[:inside], oracle(batch)[:inside], atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("variant", VARIANTS)
def test_through_the_dispatcher_and_compiled(implementation: str, variant: str) -> None:
    case = Case((*DECODE, *CHUNKS), variant=variant, **EVERYTHING)
    for call in (torch.ops.ascend_plugin.paged_attention, torch.compile(paged_attention)):
        batch = make_batch(case)
        call(*batch.arguments(), **batch.options)
        assert_close(batch)


@both_precisions
@pytest.mark.parametrize("variant", VARIANTS)
def test_opcheck(implementation: str, variant: str, fast: bool) -> None:
    case = Case(((1, 20), (5, 40)), order="BLHNC", variant=variant, fast=fast, **EVERYTHING)
    batch = make_batch(case)
    *tensors, layout = batch.arguments()
    torch.library.opcheck(
        torch.ops.ascend_plugin.paged_attention.default,
        (*tensors, list(layout)),
        batch.options,
    )


@pytest.mark.parametrize("variant", VARIANTS)
def test_what_the_plugin_writes_is_what_it_reads(implementation: str, variant: str) -> None:
    """Write and attention of one implementation, through the tokens alone."""
    from ascend_plugin.ops.kv_cache_write import kv_cache_write

    case = Case(((30, 90),), heads=4, kv_heads=2, block_size=32, variant=variant)
    batch = make_batch(case)
    int8 = Int8(case.page)
    generator = torch.Generator().manual_seed(9)
    key, value = (
        int8.magnitudes()[j] * torch.randn(90, 2, 64, generator=generator) for j in (0, 1)
    )
    tokens = torch.arange(90)
    slots = batch.block_table[0, tokens // 32].long() * 32 + tokens % 32
    kv_cache_write(key, value, batch.pages, slots, case.page.layout(), **int8.write_options())
    batch.keys, batch.values = [key], [value]
    batch.run()
    assert relative_error(batch.out, oracle(batch)) < 0.03  # int8 itself, and rare clipping
