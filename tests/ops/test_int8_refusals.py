"""What both operators refuse about int8 pages: value, what is allowed, and the remedy."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import int8_pages
import paging
import pytest
import torch
from attention_cases import Case, make_batch
from int8_pages import VARIANTS, Int8

from ascend_plugin.ops import kv_cache_write as write_module
from ascend_plugin.ops import paged_attention as attention_module

Arguments = dict[str, Any]
Change = Callable[[Arguments], Arguments]


def _layout(**replaced: int) -> Change:
    return lambda a: {"layout": a["layout"]._replace(**replaced)}


def _scales(change: Callable[[torch.Tensor], torch.Tensor | None]) -> Change:
    return lambda a: {"channel_scales": change(a["channel_scales"])}


SCALES_SHAPE = (
    r"channel_scales must be float32 \[2, 2, 64\] \(K and V, kv heads, head dimension\), got"
)

#: Name: variant, change, message. For both operators.
SHARED: dict[str, tuple[str, Change, str]] = {
    "scales missing": (
        "c8s",
        _scales(lambda s: None),
        r"c8s pages need channel_scales, float32 \[2, 2, 64\] .*give the layer's scales, or use c8",
    ),
    "scales missing, patches": ("c8p-int4", _scales(lambda s: None), r"c8p pages need channel_sc"),
    "scales given": (
        "c8d",
        lambda a: {"channel_scales": torch.ones(2, 2, 64)},
        r"c8d pages take no channel_scales; they belong to c8s and c8p pages. Leave them out",
    ),
    "scales of another dtype": (
        "c8s",
        _scales(torch.Tensor.double),
        SCALES_SHAPE + r" torch.float64 \[2, 2, 64\]; give the scales of this layer and tensor-par",
    ),
    "scales of another rank": ("c8s", _scales(lambda s: s[0]), SCALES_SHAPE + r".* \[2, 64\]"),
    "scales of more heads": (
        "c8p-e3m0",
        _scales(lambda s: s.repeat(1, 2, 1)),
        SCALES_SHAPE + r".* \[2, 4, 64\]",
    ),
    "scales of another width": ("c8s", _scales(lambda s: s[..., :32]), SCALES_SHAPE),
    "scales not contiguous": (
        "c8s",
        _scales(lambda s: s.transpose(0, 1).contiguous().transpose(0, 1)),
        r"channel_scales must be contiguous; call \.contiguous\(\)",
    ),
    "dtype": (
        "c8d",
        lambda a: {"pages": a["pages"].view(torch.int16)},
        r"c8d pages hold int8, got torch.int16. Use --kv-cache-dtype int8_per_token_head",
    ),
    "unknown variant": (
        "c8d",
        _layout(quantisation=9),
        r"quantisation 9 is unknown; allowed are \{0: 'none', 1: 'c8d', 2: 'c8s', 3: 'c8p'\}",
    ),
    "unknown patch code": (
        "c8p-int4",
        _layout(patch_code=2),
        r"patch_code 2 is unknown; allowed are \{0: 'int4', 1: 'e3m0'\}. Make the layout with",
    ),
    "no patch slots": (
        "c8p-int4",
        _layout(patch_slots=0),
        r"patch_slots 0 is not supported; allowed are even numbers from 2 to the block size \(16\)",
    ),
    "odd patch slots": ("c8p-int4", _layout(patch_slots=1), r"patch_slots 1 is not supported"),
    "many patch slots": ("c8p-int4", _layout(patch_slots=18), r"patch_slots 18 is not supported"),
    "patch slots beyond the run": (
        "c8p-int4",
        _layout(patch_slots=16),
        r"k_patches_offset 2048 does not place 608 bytes of whole elements in a \(block, kv head\) "
        r"of \d+ bytes; make it from a PageFormat",
    ),
    "K scales": ("c8d", _layout(k_scales_offset=-4), r"k_scales_offset -4 does not place 64 bytes"),
    "V scales": ("c8d", _layout(v_scales_offset=2116), r"v_scales_offset 2116 .* of 2176 bytes"),
    "unaligned": ("c8d", _layout(v_scales_offset=2050), r"v_scales_offset 2050 does not place"),
    "K patches": ("c8p-e3m0", _layout(k_patches_offset=4096), r"k_patches_offset 4096 does not"),
    "V patches": ("c8p-e3m0", _layout(v_patches_offset=2050), r"v_patches_offset 2050 does not"),
    "V": ("c8s", _layout(v_offset=1025), r"v_offset 1025 does not place 1024 bytes"),
    "odd strides": (
        "c8d",
        lambda a: {"pages": _odd_strides(a["pages"])},
        r"blocks and kv heads must lie whole multiples of 4 bytes apart; got strides \(\d+, \d+, "
        r"\d+, 1\). Pad pages",
    ),
}

WRITE: dict[str, tuple[str, Change, str]] = {
    "thresholds missing": (
        "c8p-int4",
        lambda a: {"patch_thresholds": []},
        r"c8p pages need two patch_thresholds, of K and of V, got \[\]; give relative errors",
    ),
    "one threshold": (
        "c8p-int4",
        lambda a: {"patch_thresholds": [0.1]},
        r"c8p pages need two patch_thresholds, of K and of V, got \[0.1\]",
    ),
    "three thresholds": ("c8p-int4", lambda a: {"patch_thresholds": [0.1] * 3}, r"need two patch"),
    "thresholds given": (
        "c8s",
        lambda a: {"patch_thresholds": [0.1, 0.2]},
        r"patch_thresholds=\[0.1, 0.2\] belong to c8p pages, these are c8s; leave them out",
    ),
    "negative threshold": (
        "c8p-e3m0",
        lambda a: {"patch_thresholds": [0.1, -0.2]},
        r"patch_thresholds=\[0.1, -0.2\] must not be negative or NaN",
    ),
    "NaN threshold": (
        "c8p-int4",
        lambda a: {"patch_thresholds": [float("nan"), 0.1]},
        r"patch_thresholds=\[nan, 0.1\] must not be negative or NaN",
    ),
    "counters of another dtype": (
        "c8d",
        lambda a: {"counters": torch.zeros(4, dtype=torch.int32)},
        r"counters must be int64 \[4\] \(rows written, saturated, patched, patches without a slot\)"
        r", got torch.int32 \[4\]",
    ),
    "counters of another shape": (
        "c8p-int4",
        lambda a: {"counters": torch.zeros(3, dtype=torch.int64)},
        r"counters must be int64 \[4\] .*got torch.int64 \[3\]",
    ),
    "counters not contiguous": (
        "c8s",
        lambda a: {"counters": torch.zeros(8, dtype=torch.int64)[::2]},
        r"counters must be contiguous; call \.contiguous\(\)",
    ),
}


def _odd_strides(pages: torch.Tensor) -> torch.Tensor:
    blocks, heads, tokens, content = pages.shape
    run = tokens * content
    buffer = torch.zeros(blocks * heads * (run + 1), dtype=torch.int8)
    return buffer.as_strided(pages.shape, (heads * (run + 1), run + 1, content, 1))


def _write_arguments(variant: str) -> Arguments:
    int8 = Int8(int8_pages.page_format(variant, 16, 2, 64))
    key, value = int8.rows(20, torch.Generator().manual_seed(0))
    return {
        "key": key,
        "value": value,
        "pages": int8_pages.make_pages(int8.page, 3),
        "slot_mapping": torch.arange(20),
        "layout": int8.page.layout(),
        **int8.write_options(),
    }


def _attention_arguments(variant: str) -> Arguments:
    batch = make_batch(Case(((1, 20), (6, 30)), variant=variant))
    names = ("query", "pages", "out", "query_start_loc", "seq_lens", "block_table", "layout")
    return dict(zip(names, batch.arguments(), strict=True)) | batch.options


@pytest.mark.parametrize("warm", [False, True], ids=["first call", "after a good call"])
@pytest.mark.parametrize("name", [*SHARED, *WRITE])
def test_the_write_refuses(name: str, warm: bool) -> None:
    variant, change, message = (SHARED | WRITE)[name]
    arguments = _write_arguments(variant)
    write_module.operator.forget()
    if warm:  # what its signature lets later calls skip must not hide their faults
        write_module.kv_cache_write(**arguments)
    before = paging.storage(arguments["pages"]).clone()
    with pytest.raises(ValueError, match=message):
        write_module.kv_cache_write(**arguments | change(arguments))
    assert torch.equal(paging.storage(arguments["pages"]), before)


@pytest.mark.parametrize("warm", [False, True], ids=["first call", "after a good call"])
@pytest.mark.parametrize("name", SHARED)
def test_attention_refuses(name: str, warm: bool) -> None:
    variant, change, message = SHARED[name]
    arguments = _attention_arguments(variant)
    attention_module.operator.forget()
    if warm:
        attention_module.paged_attention(**arguments)
    before = arguments["out"].clone()
    with pytest.raises(ValueError, match=message):
        attention_module.paged_attention(**arguments | change(arguments))
    assert torch.equal(arguments["out"], before)


@pytest.mark.parametrize("warm", [False, True], ids=["first call", "after a good call"])
def test_pages_without_quantisation_take_none_of_it(warm: bool) -> None:
    batch = make_batch(Case(((1, 20), (6, 30))))
    attention_module.operator.forget()
    write_module.operator.forget()
    key, slots, layout = torch.randn(4, 2, 64), torch.arange(4), batch.case.page.layout()
    if warm:
        batch.run()
        write_module.kv_cache_write(key, key, batch.pages, slots, layout)
    before = paging.bits(paging.storage(batch.pages))
    for options, message in (
        (
            {"fast": True},
            r"fast=True is for int8 pages; .*kv_cache.precision to 'exact', or use --",
        ),
        (
            {"channel_scales": torch.ones(2, 2, 64)},
            r"pages without quantisation take no channel_scales; .*Leave them out",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            attention_module.paged_attention(*batch.arguments(), **batch.options | options)
    for options, message in (
        ({"channel_scales": torch.ones(2, 2, 64)}, r"pages without quantisation take no channel_s"),
        ({"patch_thresholds": [0.1, 0.1]}, r"belong to c8p pages, these are none; leave them out"),
        ({"counters": torch.zeros(4)}, r"counters must be int64 \[4\]"),
    ):
        with pytest.raises(ValueError, match=message):
            write_module.kv_cache_write(key, key, batch.pages, slots, layout, **options)
    assert torch.equal(paging.bits(paging.storage(batch.pages)), before)
    counters = torch.zeros(4, dtype=torch.int64)
    write_module.kv_cache_write(key, key, batch.pages, slots, layout, counters=counters)
    assert counters.tolist() == [0, 0, 0, 0], "nothing is counted without quantisation"


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_run_must_be_the_layouts(variant: str) -> None:
    arguments = _write_arguments(variant)
    run = arguments["layout"].run_bytes
    for wrong in (run - 64, run + 64):
        with pytest.raises(ValueError, match=rf"holds {run} bytes, its layout says {wrong}; make"):
            write_module.kv_cache_write(**arguments | _layout(run_bytes=wrong)(arguments))
