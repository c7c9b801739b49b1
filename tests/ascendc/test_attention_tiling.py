"""The functions that divide the work of ``paged_attention_c8``."""

from __future__ import annotations

from itertools import pairwise

import pytest
from attention_tiling import Shape, owner, share_begin
from hypothesis import given
from hypothesis import strategies as st

C8D, C8S, C8P = 1, 2, 3
#: Bytes of an AI core's memories.
L1, L0A, L0B, L0C = 524288, 65536, 65536, 131072

shapes = st.builds(
    lambda group, kv_heads, columns, blocks, queries, window, quantisation: Shape(
        group * kv_heads, kv_heads, 32 * columns, 16 * blocks, queries, window, quantisation
    ),
    st.integers(1, 16),
    st.integers(1, 8),
    st.integers(1, 8),
    st.integers(1, 16),
    st.integers(1, 16),
    st.sampled_from((0, 1, 7, 128, 4096)),
    st.sampled_from((C8D, C8S, C8P)),
)


@given(total=st.integers(1, 10_000), cores=st.integers(1, 48), data=st.data())
def test_shares_cover_the_line_once_and_are_even(total: int, cores: int, data) -> None:
    begins = [share_begin(total, cores, core) for core in range(cores + 1)]
    sizes = [b - a for a, b in pairwise(begins)]
    assert begins[0] == 0
    assert begins[-1] == total
    assert 0 <= min(sizes) <= max(sizes) <= min(sizes) + 1
    position = data.draw(st.integers(0, total - 1))
    core = owner(total, cores, position)
    assert begins[core] <= position < begins[core + 1]


def test_shares_of_many_tiles_do_not_overflow() -> None:
    total = 1 << 40
    assert share_begin(total, 48, 48) == total
    assert owner(total, 48, total - 1) == 47


@given(shape=shapes)
def test_tiles_fit_into_the_memories_of_a_core(shape: Shape) -> None:
    g = shape.geometry()
    patched = shape.quantisation == C8P
    assert g.pages_per_tile >= 1
    assert g.tile_tokens == g.pages_per_tile * shape.block_size
    assert g.tile_tokens + g.patch_columns <= g.columns <= (320 if patched else 256)
    assert g.columns % 64 == 0
    assert g.slots == (shape.block_size // 8 if patched else 0)
    assert g.slot_columns == -(-g.slots // 16) * 16
    rows = 2 * g.step_rows
    query = 2 * shape.heads // shape.kv_heads * shape.max_query_len * shape.head_dim
    assert query + 4 * g.columns * shape.head_dim + 2 * rows * g.columns <= L1
    assert 2 * rows * max(g.columns, shape.head_dim) <= L0A
    product = 64 if patched else 128
    assert 2 * max(128 * shape.head_dim, g.columns * product) <= L0B
    assert 2 * rows * 128 * 4 <= L0C


@given(shape=shapes, length=st.integers(0, 5000), queries=st.integers(0, 16))
def test_context_covers_what_rows_see(shape: Shape, length: int, queries: int) -> None:
    c, g = shape.context(length, queries), shape.geometry()
    first = max(0, length - queries - shape.window + 1) if shape.window else 0
    assert c.first == first
    assert c.first_page == first // shape.block_size
    assert c.first_page + c.pages == -(-length // shape.block_size)
    if queries == 0:
        assert c.tiles == 0
    else:
        assert c.tiles == max(1, -(-c.pages // g.pages_per_tile))


@given(shape=shapes, cores=st.integers(1, 48))
def test_arrays_of_the_workspace_lie_apart_and_aligned(shape: Shape, cores: int) -> None:
    g = shape.geometry()
    starts = shape.workspace()
    total = starts.pop()
    rows = -(-shape.heads // shape.kv_heads * shape.max_query_len // g.step_rows) * g.step_rows
    rows = max(rows, g.step_rows)
    step = 2 * g.step_rows
    sizes = [
        2 * rows * shape.head_dim,
        2 * step * g.columns * 4,
        2 * step * g.columns,
        2 * step * shape.head_dim * 4,
        3 * 4 * g.columns * 4,
        3 * 2 * g.patch_columns * shape.head_dim,
        rows * shape.head_dim * 4,
        2 * rows * (shape.head_dim + 16) * 4,
    ]
    for start, size, end in zip(starts, sizes, [*starts[1:], total], strict=True):
        assert start % 32 == 0
        assert start + size <= end
    assert total % 512 == 0
    assert shape.workspace_bytes(cores) == cores * total


def test_a_page_of_decode_is_one_step_for_all_query_tokens() -> None:
    """A group of 8 with 1 + 3 tokens takes the 64 rows of one step, not 4 steps."""
    shape = Shape(8, 1, 128, 128, 4, 0, C8D)
    assert shape.geometry().step_rows == 8 * 4
    assert shape.context(4096, 4).tiles == 4096 // 256


@pytest.mark.parametrize(("block_size", "tokens"), [(16, 256), (48, 240), (128, 256), (256, 256)])
def test_tiles_are_as_many_whole_pages_as_fit(block_size: int, tokens: int) -> None:
    assert Shape(8, 1, 128, block_size, 1, 0, C8S).geometry().tile_tokens == tokens
