"""Int8 pages as vLLM's layers and accounting see them."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from attention_cases import Case, make_batch
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVQuantMode, SlidingWindowSpec

from ascend_plugin.attention.cpu import (
    AscendCPUAttentionBackend,
    AscendCPUAttentionImpl,
    AscendCPUMetadata,
)
from ascend_plugin.attention.kv_quantisation import LayerQuantisation, backend_of
from ascend_plugin.kv_cache import PageFormat
from ascend_plugin.ops.page_layout import PatchCode, Quantisation

INT8 = "int8_per_token_head"
QUANTISED = (Quantisation.C8D, Quantisation.C8S, Quantisation.C8P)


def _spec(block_size: int = 32, head_dim: int = 64, window: bool = False):
    shape = {"block_size": block_size, "num_kv_heads": 2, "head_size": head_dim}
    kind = {"dtype": torch.int8, "kv_quant_mode": KVQuantMode.INT8_PER_TOKEN_HEAD}
    if window:
        return SlidingWindowSpec(**shape, **kind, sliding_window=100)
    return FullAttentionSpec(**shape, **kind)


@pytest.mark.parametrize("window", [False, True])
@pytest.mark.parametrize(("block_size", "head_dim"), [(16, 64), (128, 128), (48, 80), (256, 256)])
@pytest.mark.parametrize("quantisation", QUANTISED, ids=lambda q: q.name)
def test_vllm_counts_the_bytes_of_pages(
    quantisation: Quantisation, block_size: int, head_dim: int, window: bool
) -> None:
    backend = backend_of(AscendCPUAttentionBackend, quantisation)
    page = PageFormat(torch.int8, block_size, 2, head_dim, quantisation)
    spec = backend.customize_spec(_spec(block_size, head_dim, window))
    assert spec.page_size_bytes == page.page_bytes
    assert spec.state_content_size_bytes == page.token_bytes
    assert backend.customize_spec(spec) == spec  # vLLM asks again


def test_vllm_may_compare_sizes_of_single_tokens() -> None:
    for quantisation in QUANTISED:
        backend = backend_of(AscendCPUAttentionBackend, quantisation)
        one = backend.customize_spec(_spec(block_size=1, window=True)).real_page_size_bytes
        full = backend.customize_spec(_spec(block_size=128, window=True)).real_page_size_bytes
        assert full <= 128 * one < 1.02 * full


def test_backends_of_variants() -> None:
    base = AscendCPUAttentionBackend
    assert backend_of(base, Quantisation.C8D) is base
    c8p = backend_of(base, Quantisation.C8P)
    assert c8p is backend_of(base, Quantisation.C8P)
    assert issubclass(c8p, base)
    assert c8p.full_cls_name() == (base.__module__, "AscendCPUAttentionBackendC8P")
    # vLLM derives backends of its own from ours, for example for chunked local attention.
    derived = type("Derived", (base,), {"get_name": staticmethod(lambda: "DERIVED")})
    assert backend_of(derived, Quantisation.C8S).get_name() == "DERIVED"


def _described(quantisation: Quantisation, case: Case) -> LayerQuantisation:
    generator = torch.Generator().manual_seed(0)
    scales = torch.rand((2, case.kv_heads, case.head_dim), generator=generator) * 0.01 + 0.01
    return LayerQuantisation(
        quantisation,
        PatchCode.E3M0,
        scales if quantisation.static else None,
        (0.05, 0.05) if quantisation is Quantisation.C8P else (),
        torch.zeros(4, dtype=torch.int64),
    )


@pytest.mark.parametrize("wider", [0, 4])
@pytest.mark.parametrize("quantisation", QUANTISED, ids=lambda q: q.name)
def test_update_then_forward(quantisation: Quantisation, wider: int) -> None:
    """Also when vLLM has kept more bytes per token than blocks of this size need."""
    batch = make_batch(Case(((1, 30), (9, 44), (4, 4)), heads=6, kv_heads=2, block_size=16))
    case = batch.case
    impl = AscendCPUAttentionImpl(6, case.head_dim, case.head_dim**-0.5, 2, kv_cache_dtype=INT8)
    impl.kv_quantisation = _described(quantisation, case)
    page = PageFormat(torch.int8, 16, 2, case.head_dim, *impl.kv_quantisation.page_options)
    shape = page.pages_shape(batch.pages.shape[0])
    pages = torch.full((*shape[:3], shape[3] + wider), 0x7F, dtype=torch.int8)  # NaN as scales
    rows = 0
    for i, (_, length) in enumerate(case.sequences):
        token = torch.arange(length)
        slots = batch.block_table[i, token // 16].long() * 16 + token % 16
        impl.do_kv_cache_update(None, batch.keys[i], batch.values[i], pages, slots)
        rows += length * 2 * 2
    counted = impl.kv_quantisation.counters.tolist()
    assert counted[0] == rows
    assert (counted[1] > 0) == quantisation.static
    assert (counted[2] > 0) == (quantisation is Quantisation.C8P)
    metadata = AscendCPUMetadata(
        num_actual_tokens=int(batch.query_start_loc[-1]),
        query_start_loc=batch.query_start_loc,
        seq_lens=batch.seq_lens,
        block_table=batch.block_table,
        causal=True,
    )
    exact = batch.run().clone()
    out, nothing = torch.empty_like(batch.out), torch.empty(0)
    impl.forward(None, batch.query, nothing, nothing, pages, metadata, out)
    limit = 0.02 if quantisation is Quantisation.C8D else 1.0  # static scales saturate here
    assert 0 < float((out - exact).abs().max()) < limit


def test_an_unquantised_layer_of_an_int8_model() -> None:
    impl = AscendCPUAttentionImpl(4, 64, 1.0, 2, kv_cache_dtype=INT8)
    assert impl.kv_quantisation is not None
    assert impl.kv_quantisation.quantisation is Quantisation.C8D
    impl.kv_quantisation = None
    pages = torch.zeros(PageFormat(torch.float32, 16, 2, 64).pages_shape(2))
    assert impl.layout(pages) == tuple(PageFormat(torch.float32, 16, 2, 64).layout())
    assert AscendCPUAttentionImpl(4, 64, 1.0, 2).kv_quantisation is None


def test_a_description_cannot_be_changed() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        LayerQuantisation(Quantisation.C8D).fast = True
