"""Hypothesis strategies: odd shapes within what pages can hold."""

from __future__ import annotations

import paging
import torch
from attention_cases import Case
from hypothesis import strategies as st

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
HEAD_DIMS = (16, 32, 64, 80, 96, 112, 128, 160, 192, 256)
BLOCK_SIZES = (16, 32, 48, 64, 112, 128, 240, 256)


@st.composite
def sequences(draw: st.DrawFn) -> tuple[tuple[int, int], ...]:
    """Mix decode, verification, chunked prefill and sequences without rows."""
    kinds = draw(st.lists(st.sampled_from(("decode", "verify", "chunk", "none")), max_size=4))
    found = []
    for kind in kinds:
        low, high = {"decode": (1, 1), "verify": (2, 16), "chunk": (17, 70), "none": (0, 0)}[kind]
        rows = draw(st.integers(low, high))
        found.append((rows, rows + draw(st.integers(0, 300))))
    return tuple(found)


@st.composite
def attention_cases(draw: st.DrawFn) -> Case:
    """Everything that the attention operator documents, in any combination."""
    kv_heads = draw(st.integers(1, 3))
    return Case(
        sequences=draw(sequences()),
        heads=kv_heads * draw(st.integers(1, 16)),
        kv_heads=kv_heads,
        head_dim=draw(st.sampled_from(HEAD_DIMS)),
        block_size=draw(st.sampled_from(BLOCK_SIZES)),
        dtype=draw(st.sampled_from(DTYPES)),
        page_dtype=draw(st.sampled_from(DTYPES)),
        causal=draw(st.booleans()),
        window=draw(st.sampled_from((0, 0, 1, 5, 16, 33, 100))),
        soft_cap=draw(st.sampled_from((0.0, 0.0, 0.5, 30.0))),
        alibi=draw(st.booleans()),
        sinks=draw(st.booleans()),
        order=draw(st.sampled_from(paging.ORDERS)),
        strided=draw(st.booleans()),
        padding=draw(st.integers(0, 3)),
        seed=draw(st.integers(0, 2**16)),
    )
