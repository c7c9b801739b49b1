"""Int8 pages over their life: rejected drafts, reuse without zeroing, copies."""

from __future__ import annotations

from dataclasses import replace

import int8_pages
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from int8_pages import VARIANTS, Int8

from ascend_plugin.ops.kv_cache_write import kv_cache_write

BLOCK, HEADS, DIM = 32, 2, 32


class Sequence:
    """Tokens that a request wrote into one block, and what each may mean when it is read."""

    def __init__(self, variant: str, seed: int) -> None:
        self.int8 = Int8(int8_pages.page_format(variant, BLOCK, HEADS, DIM))
        self.pages = int8_pages.make_pages(self.int8.page, 2, seed=seed)
        self.generator = torch.Generator().manual_seed(seed)
        self.key, self.value = (torch.empty(BLOCK, HEADS, DIM) for _ in "kv")
        self.length = 0

    def append(self, tokens: int) -> None:
        """Write new tokens, as a step of any kind does."""
        first, self.length = self.length, min(self.length + tokens, BLOCK)
        rows = slice(first, self.length)
        count = self.length - first
        self.key[rows], self.value[rows] = self.int8.rows(count, self.generator)
        if first == 0 and count:
            self.key[0], self.value[0] = 9.0, -9.0  # a sink
        slots = torch.arange(first, self.length) + BLOCK
        kv_cache_write(
            self.key[rows],
            self.value[rows],
            self.pages,
            slots,
            self.int8.page.layout(),
            **self.int8.write_options(),
        )

    def check(self) -> int:
        """Every token means its own row, patched or not; how many rows have a patch."""
        slots = torch.arange(self.length) + BLOCK
        if not self.length:
            return 0
        fresh = int8_pages.make_pages(self.int8.page, 2)
        patched = 0
        got = int8_pages.read(self.pages, self.int8, slots)
        for i in range(self.length):
            # Alone in an empty block, an outlier finds its slot: the best that its row can be.
            never = replace(self.int8, thresholds=(float("inf"), float("inf")))
            one = slice(i, i + 1)
            allowed = []
            for each in (never, self.int8):
                int8_pages.write(fresh, each, slots[one], self.key[one], self.value[one])
                allowed.append(int8_pages.read(fresh, self.int8, slots[one]))
            for j in range(2):
                plain, best = (pair[j][0] for pair in allowed)
                is_plain = (got[j][i] == plain).all(-1)  # [kv_heads]
                is_best = (got[j][i] == best).all(-1)
                assert bool((is_plain | is_best).all()), f"token {i} is not its own row"
                if i == 0:
                    assert bool(is_best.all()), "the first token lost its patch"
                patched += int((is_best & ~is_plain).sum())
        return patched


STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("append"), st.integers(1, 9)),
        st.tuples(st.just("reject"), st.integers(1, 6)),
        st.tuples(st.just("reuse"), st.just(0)),
    ),
    max_size=14,
)


@pytest.mark.parametrize("variant", VARIANTS)
@given(steps=STEPS, seed=st.integers(0, 2**16))
@settings(max_examples=25)
def test_tokens_keep_their_meaning(
    implementation: str, variant: str, steps: list[tuple[str, int]], seed: int
) -> None:
    sequence = Sequence(variant, seed)
    for kind, count in steps:
        if kind == "append":
            sequence.append(count)
        elif kind == "reject":
            sequence.length = max(0, sequence.length - count)
        else:
            sequence.length = 0
        sequence.check()


@pytest.mark.parametrize("variant", int8_pages.PATCHED)
def test_rejected_drafts_give_their_slots_back(implementation: str, variant: str) -> None:
    sequence = Sequence(variant, 0)
    slots = sequence.int8.page.patch_slots
    sequence.append(1)
    for _ in range(5):  # drafts up to the end of the block; all are rejected
        sequence.append(BLOCK - 1)
        sequence.length = 1
    sequence.append(slots)
    outliers = (sequence.key[:slots].abs().amax(-1) > 3 * 0.75).sum()
    assert int(outliers) > 0, "nothing tested"
    assert sequence.check() >= int(outliers), "a draft still holds a slot"


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_moved_block_means_the_same(implementation: str, variant: str) -> None:
    """A page is self-contained: its region is all that a copy needs."""
    sequence = Sequence(variant, 3)
    sequence.append(BLOCK)
    page = sequence.int8.page
    slots = torch.arange(BLOCK)
    before = int8_pages.read(sequence.pages, sequence.int8, slots + BLOCK)
    (region,) = page.regions(2)
    raw = sequence.pages.view(torch.uint8).flatten()
    raw[: region.nbytes] = raw[region.stride : region.stride + region.nbytes]
    for moved, there in zip(
        int8_pages.read(sequence.pages, sequence.int8, slots), before, strict=True
    ):
        assert torch.equal(moved, there)
