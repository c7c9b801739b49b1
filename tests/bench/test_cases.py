"""Cases of ``bench attention``: sizes, defaults, bytes and operations."""

from __future__ import annotations

import pytest

from ascend_plugin.bench.attention.cases import Case, Geometry, make_cases, same_shape
from ascend_plugin.bench.errors import BenchError
from ascend_plugin.bench.machine import last_level_cache_bytes


def test_the_defaults_cover_the_acceptance_case():
    cases = make_cases((), (), (), (), 2048, Geometry())
    shapes = [(case.phase, case.variant, case.batch, case.context) for case in cases]
    assert shapes == [
        ("decode", "bf16", 1, 8192),
        ("decode", "bf16", 8, 8192),
        ("prefill", "bf16", 1, 2048),
        ("write", "bf16", 8, 8192),
        ("write", "bf16", 2048, 8192),
    ]
    geometry = cases[0].geometry
    assert (geometry.heads, geometry.kv_heads, geometry.head_dim) == (32, 8, 128)


def test_bytes_and_operations_of_a_decode():
    case = Case("decode", "bf16", 2, 100, 1, Geometry(heads=4, kv_heads=2, head_dim=32))
    assert case.moved_bytes == 2 * 100 * (2 * 2 * 32 * 2)
    assert case.flop == 2 * 100 * (4 * 4 * 32)


def test_operations_of_a_prefill_count_visible_tokens_only():
    case = Case("prefill", "fp32", 1, 5, 3, Geometry(heads=1, kv_heads=1, head_dim=16))
    assert case.flop == (3 + 4 + 5) * 4 * 16


@pytest.mark.parametrize("batch, context", [(1, 8192), (8, 8192), (1, 512)])
def test_the_caches_exceed_the_processors_cache(batch, context):
    case = Case("decode", "bf16", batch, context, 1, Geometry())
    assert case.layers >= 2
    if case.layers < 64:
        assert case.layers * case.cache_bytes >= 4 * last_level_cache_bytes()


def test_a_write_needs_a_cache_for_all_its_tokens():
    case = Case("write", "bf16", 300, 64, 1, Geometry(block_size=32))
    assert case.num_blocks == 10


@pytest.mark.parametrize("name", ["heads", "kv_heads", "head_dim", "block_size"])
def test_a_geometry_without_extent_is_refused(name):
    with pytest.raises(BenchError, match="at least 1"):
        Geometry(**{name: 0})


def test_variants_of_one_shape_are_measured_together():
    cases = make_cases(("decode", "write"), ("c8s", "c8p", "fp16"), (1, 8), (64,), 1, Geometry())
    groups = [[case.label for case in group] for group in same_shape(cases)]
    assert groups == [
        [f"{phase} {variant} {what} {batch} context 64" for variant in variants]
        for phase, what in (("decode", "batch"), ("write", "tokens"))
        for variants, batch in (
            (("c8s", "c8p"), 1),
            (("c8s", "c8p"), 8),
            (("fp16",), 1),
            (("fp16",), 8),
        )
    ]
