"""vLLM's accounting of the cache, and the views it binds, agree with ``PageFormat``."""

from __future__ import annotations

import paging
import pytest
import torch
from attention_cases import Case, assert_close, make_batch
from strategies import DTYPES
from vllm.v1.kv_cache_interface import (
    AttentionSpec,
    FullAttentionSpec,
    KVCacheLayout,
    KVCacheTensor,
    SlidingWindowSpec,
    create_kv_cache_views,
)

from ascend_plugin.attention.cpu import AscendCPUAttentionBackend
from ascend_plugin.kv_cache import PageFormat

LAYERS, BLOCKS = ["a", "b", "c"], 6
LAYOUTS = AscendCPUAttentionBackend.supported_kv_cache_layouts()


def _spec(page: PageFormat, **more: int) -> AttentionSpec:
    return FullAttentionSpec(
        block_size=page.block_size,
        num_kv_heads=page.num_kv_heads,
        head_size=page.head_dim,
        dtype=page.dtype,
        **more,
    )


def _views(page: PageFormat, layout: KVCacheLayout, padding: int = 0) -> list[torch.Tensor]:
    """Lay out three layers as vLLM's worker does."""
    spec = AscendCPUAttentionBackend.customize_spec(
        _spec(page, page_size_padded=page.page_bytes + padding) if padding else _spec(page)
    )
    stride = spec.page_size_bytes
    outer = layout == KVCacheLayout.LBHNC
    size = stride * BLOCKS * len(LAYERS)
    tensor = KVCacheTensor(
        size=size,
        layers=LAYERS,
        layer_stride=stride * BLOCKS if outer else stride,
        block_stride=stride if outer else stride * len(LAYERS),
    )
    return create_kv_cache_views(torch.zeros(size, dtype=torch.int8), spec, BLOCKS, layout, tensor)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("block_size", "head_dim"), [(16, 16), (128, 64), (48, 80), (256, 256)])
def test_page_bytes(dtype: torch.dtype, block_size: int, head_dim: int) -> None:
    page = PageFormat(dtype, block_size, 3, head_dim)
    spec = AscendCPUAttentionBackend.customize_spec(_spec(page))
    assert spec.page_size_bytes == page.page_bytes
    assert spec.state_content_size_bytes == page.token_bytes
    assert spec.num_heads == page.num_kv_heads


def test_a_spec_can_be_customised_twice() -> None:
    page = PageFormat(torch.bfloat16, 32, 2, 64)
    window = SlidingWindowSpec(
        block_size=32, num_kv_heads=2, head_size=64, dtype=torch.bfloat16, sliding_window=100
    )
    for spec in (_spec(page), window):
        once = AscendCPUAttentionBackend.customize_spec(spec)
        assert AscendCPUAttentionBackend.customize_spec(once) == once
        assert once.page_size_bytes == page.page_bytes


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("padding", [0, 64])
def test_attention_over_the_views_that_vllm_binds(layout: KVCacheLayout, padding: int) -> None:
    batch = make_batch(Case(((1, 30), (9, 44)), dtype=torch.bfloat16))
    case = batch.case
    views = _views(case.page, layout, padding)
    assert [tuple(view.shape) for view in views] == [case.page.pages_shape(BLOCKS)] * len(LAYERS)
    used = batch.pages.shape[0]
    assert used - 1 <= BLOCKS
    for view in views:
        view.fill_(float("nan"))
    blocks = torch.arange(used - 1)
    views[1][blocks] = batch.pages[blocks + 1]  # block 0 of the batch is unused
    others = [paging.bits(view) for view in (views[0], views[2])]
    batch.block_table -= 1
    batch.pages = views[1]
    batch.run()
    assert_close(batch)
    for view, before in zip((views[0], views[2]), others, strict=True):
        assert torch.equal(paging.bits(view), before)


def test_the_capacity_that_vllm_counts_is_what_pages_take() -> None:
    page = PageFormat(torch.bfloat16, 128, 3, 64)
    views = _views(page, KVCacheLayout.LBHNC)
    assert views[0].untyped_storage().nbytes() == len(LAYERS) * BLOCKS * page.page_bytes
    assert views[1].stride(0) * page.dtype.itemsize == page.page_bytes
    assert page.regions(BLOCKS)[0].stride == page.page_bytes


@pytest.mark.parametrize(
    ("head_size", "head_size_v", "message"),
    [
        (72, 72, "head dimension 72 is not supported"),
        (192, 128, r"V's head dimension 128 differs from K's \(192\).*CPU_ATTN"),
    ],
)
def test_specs_that_pages_cannot_hold_are_refused(
    head_size: int, head_size_v: int, message: str
) -> None:
    spec = FullAttentionSpec(
        block_size=16,
        num_kv_heads=2,
        head_size=head_size,
        head_size_v=head_size_v,
        dtype=torch.bfloat16,
    )
    with pytest.raises(ValueError, match=message):
        AscendCPUAttentionBackend.customize_spec(spec)
