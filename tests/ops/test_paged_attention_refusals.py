"""What ``paged_attention`` refuses: every message names the value, what is allowed, the remedy."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from attention_cases import Batch, Case, make_batch

from ascend_plugin.ops.page_layout import PageLayout
from ascend_plugin.ops.paged_attention import operator as paged_attention_operator
from ascend_plugin.ops.paged_attention import paged_attention


def _call(batch: Batch, **replaced: object) -> None:
    names = ("query", "pages", "out", "query_start_loc", "seq_lens", "block_table", "layout")
    arguments = dict(zip(names, batch.arguments(), strict=True)) | batch.options | replaced
    paged_attention(**arguments)


def _layout(**replaced: int) -> Callable[[Batch], dict]:
    return lambda batch: {"layout": batch.case.page.layout()._replace(**replaced)}


def _wide(name: str) -> Callable[[Batch], dict]:
    """Every second element of a tensor twice as wide: right shape, wrong stride."""

    def replaced(batch: Batch) -> dict:
        tensor = getattr(batch, name)
        return {name: torch.cat([tensor, tensor], dim=-1)[..., ::2]}

    return replaced


REFUSALS = {
    "page dtype": (
        lambda b: {"pages": b.pages.to(torch.int8)},
        r"a page without quantisation has dtype torch.int8; allowed are float32, float16 and "
        r"bfloat16. "
        r"Change --dtype or --kv-cache-dtype",
    ),
    "query dtype": (
        lambda b: {"query": b.query.double()},
        r"query has dtype torch.float64; allowed are float32, float16 and bfloat16",
    ),
    "block size": (
        _layout(block_size=24),
        r"block size 24 is not supported; allowed are multiples of 16 up to 256. "
        r"Change --block-size \(128 is the default\)",
    ),
    "block size 0": (_layout(block_size=0), r"block size 0 is not supported"),
    "large block": (_layout(block_size=272), r"block size 272 is not supported"),
    "head dimension": (
        _layout(head_dim=72),
        r"head dimension 72 is not supported; allowed are multiples of 16 up to 256. "
        r"Use --attention-backend CPU_ATTN",
    ),
    "large head": (_layout(head_dim=272), r"head dimension 272 is not supported"),
    "pages rank": (
        lambda b: {"pages": b.pages[0]},
        r"pages must be \[blocks, kv heads, 16 \(block size\), content\], got \[2, 16, 128\]",
    ),
    "pages block": (
        lambda b: {"pages": b.pages[:, :, :8]},
        r"pages must be \[blocks, kv heads, 16 \(block size\), content\], got \[\d+, 2, 8, 128\]",
    ),
    "run bytes": (
        _layout(run_bytes=4096),
        r"a \(block, kv head\) of pages holds 8192 bytes, its layout says 4096; make both from "
        r"one PageFormat",
    ),
    "pages strides": (
        lambda b: {"pages": b.pages.transpose(1, 2).contiguous().transpose(1, 2)},
        r"pages must be contiguous within a \(block, kv head\), as in vLLM's KV cache layouts "
        r"LBHNC and BLHNC; got strides \(.*\). Unset VLLM_KV_CACHE_LAYOUT",
    ),
    "k offset": (_layout(k_offset=-4), r"k_offset -4 .*make it from a PageFormat"),
    "v offset": (_layout(v_offset=4100), r"v_offset 4100 .*make it from a PageFormat"),
    "query rank": (
        lambda b: {"query": b.query[0]},
        r"query must be \[tokens, heads, 64\] \(the page's head dimension\), got \[4, 64\]",
    ),
    "query width": (lambda b: {"query": b.query[..., :32]}, r"query must be .*got \[7, 4, 32\]"),
    "query stride": (
        _wide("query"),
        r"query must be contiguous in its last dimension; call \.contiguous\(\)",
    ),
    "out stride": (_wide("out"), r"out must be contiguous in its last dimension"),
    "out shape": (
        lambda b: {"out": b.out[1:]},
        r"out \(\[6, 4, 64\], torch.float32\) must have the shape and dtype of query "
        r"\(\[7, 4, 64\], torch.float32\)",
    ),
    "out dtype": (lambda b: {"out": b.out.half()}, r"out \(.* torch.float16\) must have the"),
    "heads": (
        lambda b: {"query": b.query[:, :3], "out": b.out[:, :3]},
        r"3 query heads are not a multiple of the pages' 2 kv heads",
    ),
    "starts dtype": (
        lambda b: {"query_start_loc": b.query_start_loc.long()},
        r"query_start_loc must be 1-dimensional torch.int32, got 1-dimensional torch.int64",
    ),
    "lengths rank": (
        lambda b: {"seq_lens": b.seq_lens[None]},
        r"seq_lens must be 1-dimensional torch.int32, got 2-dimensional torch.int32",
    ),
    "lengths stride": (
        lambda b: {"seq_lens": b.seq_lens.repeat_interleave(2)[::2]},
        r"seq_lens must be contiguous in its last dimension",
    ),
    "table rank": (
        lambda b: {"block_table": b.block_table[0]},
        r"block_table must be 2-dimensional torch.int32, got 1-dimensional",
    ),
    "table stride": (
        _wide("block_table"),
        r"block_table must be contiguous in its last dimension; call \.contiguous\(\)",
    ),
    "sequence counts": (
        lambda b: {"seq_lens": b.seq_lens[:1]},
        r"1 seq_lens need 2 query_start_loc and 1 rows of block_table, got 3 and 2",
    ),
    "table rows": (lambda b: {"block_table": b.block_table[:1]}, r"2 seq_lens need .*3 and 1"),
    "window": (
        lambda b: {"window": -1},
        r"window=-1 and soft_cap=0.0 must not be negative; 0 means none",
    ),
    "soft cap": (lambda b: {"soft_cap": -2.0}, r"soft_cap=-2.0 must not be negative"),
    "slopes": (
        lambda b: {"alibi_slopes": torch.ones(3)},
        r"alibi_slopes must be float32 \[4\] \(query heads\), got torch.float32 \[3\]",
    ),
    "slopes dtype": (
        lambda b: {"alibi_slopes": torch.ones(4, dtype=torch.float64)},
        r"alibi_slopes must be float32 \[4\] \(query heads\), got torch.float64 \[4\]",
    ),
    "sinks": (
        lambda b: {"sinks": torch.ones(4, dtype=torch.bfloat16)},
        r"sinks must be float32 \[4\] \(query heads\), got torch.bfloat16 \[4\]",
    ),
    "sinks stride": (
        lambda b: {"sinks": torch.ones(8)[::2]},
        r"sinks must be contiguous; call \.contiguous\(\)",
    ),
}


@pytest.mark.parametrize("warm", [False, True], ids=["first call", "after a good call"])
@pytest.mark.parametrize("name", REFUSALS)
def test_refusals(name: str, warm: bool) -> None:
    replaced, message = REFUSALS[name]
    batch = make_batch(Case(((1, 20), (6, 30))))
    paged_attention_operator.forget()
    if warm:  # what its signature lets later calls skip must not hide their faults
        batch.run()
    before = batch.out.clone()
    with pytest.raises(ValueError, match=message):
        _call(batch, **replaced(batch))
    assert torch.equal(batch.out, before)


@pytest.mark.parametrize(
    ("name", "values", "message"),
    [
        ("query_start_loc", [0, 1, 8], r"query_start_loc"),
        ("query_start_loc", [0, 5, 3], r"query_start_loc"),
        ("query_start_loc", [-1, 1, 7], r"query_start_loc"),
        ("seq_lens", [20, 300], r"seq_lens"),
        ("seq_lens", [20, -1], r"seq_lens"),
    ],
    ids=str,
)
def test_a_batch_that_does_not_fit_is_refused(
    implementation: str, name: str, values: list[int], message: str
) -> None:
    batch = make_batch(Case(((1, 20), (6, 30))))
    before = batch.out.clone()
    with pytest.raises(ValueError, match=message):
        _call(batch, **{name: torch.tensor(values, dtype=torch.int32)})
    assert torch.equal(batch.out, before)


def test_a_layout_of_another_length_is_refused() -> None:
    batch = make_batch(Case(((1, 20), (6, 30))))
    assert len(PageLayout._fields) == 12
    with pytest.raises(ValueError, match=r"layout has 3 numbers, 12 are needed"):
        _call(batch, layout=[16, 64, 0])
