"""Pages of latents: the byte maps of ``docs/pages.md``, and vLLM's accounting of them."""

from __future__ import annotations

import pytest
import torch
from vllm.v1.kv_cache_interface import KVQuantMode, MLAAttentionSpec

from ascend_plugin.attention.latent_quantisation import backend_of
from ascend_plugin.attention.mla_cpu import AscendCPUMLABackend
from ascend_plugin.kv_cache import LatentPageFormat, Region
from ascend_plugin.ops.npu.latent_planes import page_latents
from ascend_plugin.ops.page_layout import Arrangement, Quantisation

#: Bytes per token of DeepSeek's 512 + 64, as documented.
TOKEN_BYTES = {
    (torch.float32, Quantisation.NONE): 2304,
    (torch.bfloat16, Quantisation.NONE): 1152,
    (torch.float16, Quantisation.NONE): 1152,
    (torch.int8, Quantisation.C8D): 644,
    (torch.int8, Quantisation.C8S): 640,
}


@pytest.mark.parametrize(("kind", "token_bytes"), TOKEN_BYTES.items(), ids=str)
@pytest.mark.parametrize("block_size", [16, 48, 128, 256])
def test_bytes(kind: tuple, token_bytes: int, block_size: int) -> None:
    page = LatentPageFormat(kind[0], block_size, 512, 64, kind[1])
    assert page.token_bytes == token_bytes
    assert page.page_bytes == token_bytes * block_size
    assert page.page_bytes % 64 == 0
    assert page.pages_shape(7) == (7, block_size, token_bytes // kind[0].itemsize)


def test_the_documented_byte_maps() -> None:
    def places(page: LatentPageFormat) -> list[tuple[str, int, tuple[int, ...]]]:
        return [(plane.name, plane.offset, plane.shape) for plane in page.planes]

    bf16 = LatentPageFormat(torch.bfloat16, 128, 512, 64)
    assert places(bf16) == [("latents", 0, (32, 128, 16)), ("rotary parts", 131072, (4, 128, 16))]
    assert bf16.page_bytes == 147456
    c8d = LatentPageFormat(torch.int8, 128, 512, 64, Quantisation.C8D)
    assert places(c8d) == [
        ("latents", 0, (16, 128, 32)),
        ("rotary parts", 65536, (4, 128, 16)),
        ("scales", 81920, (128,)),
    ]
    assert c8d.page_bytes == 82432
    assert c8d.layout() == (128, 512, 64, 65536, 81920, 82432, 1)


@pytest.mark.parametrize("dims", [(16, 16), (48, 32), (80, 64), (512, 128)])
@pytest.mark.parametrize("quantisation", [Quantisation.C8D, Quantisation.C8S])
def test_arrays_tile_the_page(dims: tuple[int, int], quantisation: Quantisation) -> None:
    page = LatentPageFormat(torch.int8, 16, *dims, quantisation)
    end = 0
    for plane in page.planes:
        assert plane.offset == end
        end += plane.nbytes
    assert end == page.page_bytes
    assert page.padded_latent_dim == -(-dims[0] // 32) * 32


def test_a_block_is_one_region() -> None:
    page = LatentPageFormat(torch.bfloat16, 16, 64, 16)
    (region,) = page.regions(5)
    assert (region.offset, region.stride, region.nbytes) == (0, page.page_bytes, page.page_bytes)
    with pytest.raises(ValueError, match=r"num_blocks=-1 must not be negative"):
        page.regions(-1)


def _by_planes(dtype: torch.dtype, block: int, kind: Quantisation) -> LatentPageFormat:
    return LatentPageFormat(dtype, block, 512, 64, kind, Arrangement.PLANE_MAJOR)


def test_the_documented_regions() -> None:
    c8d = _by_planes(torch.int8, 128, Quantisation.C8D)
    assert c8d.regions(10) == (
        Region(0, 65536, 65536),
        Region(655360, 16384, 16384),
        Region(819200, 512, 512),
    )
    assert [(plane.name, plane.region) for plane in c8d.planes] == [
        ("latents", 0),
        ("rotary parts", 1),
        ("scales", 2),
    ]
    assert c8d.plane_layout() == (128, 512, 64, Quantisation.C8D)
    assert c8d.token_bytes == 644


@pytest.mark.parametrize("kind", TOKEN_BYTES, ids=str)
@pytest.mark.parametrize("block_size", [16, 48, 256])
def test_views_are_the_planes_of_the_format(kind: tuple, block_size: int) -> None:
    page, blocks = _by_planes(kind[0], block_size, kind[1]), 3
    raw = torch.zeros(blocks * page.page_bytes, dtype=torch.uint8)
    pages = raw.view(page.dtype).view(page.pages_shape(blocks))
    views = [view for view in page_latents(pages, page.plane_layout()) if view is not None]
    regions = page.regions(blocks)
    assert len(views) == len(page.planes) == len(regions)
    end = 0
    for view, plane, region in zip(views, page.planes, regions, strict=True):
        assert region.offset == end
        end += blocks * region.nbytes
        for block in range(blocks):
            at = region.offset + block * region.stride + plane.offset
            assert view[block].data_ptr() == raw.data_ptr() + at
            assert view[block].squeeze(0).shape == plane.shape
        assert view.dtype == plane.dtype
        assert view.is_contiguous()
    assert end == raw.numel()


def test_each_arrangement_has_its_own_layout() -> None:
    with pytest.raises(ValueError, match=r"use plane_layout\(\)"):
        _by_planes(torch.bfloat16, 128, Quantisation.NONE).layout()
    with pytest.raises(ValueError, match=r"use layout\(\)"):
        LatentPageFormat(torch.bfloat16, 128, 512, 64).plane_layout()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((torch.bfloat16, 16, 40, 16), r"kv_lora_rank\) 40 is not supported; .* up to 512"),
        ((torch.bfloat16, 16, 64, 144), r"qk_rope_head_dim\) 144 is not supported; .* up to 128"),
        ((torch.bfloat16, 20, 64, 16), r"block size 20"),
        ((torch.float64, 16, 64, 16), r"float64"),
        ((torch.bfloat16, 16, 64, 16, Quantisation.C8D), r"c8d pages hold int8"),
        ((torch.int8, 16, 64, 16, Quantisation.C8P), r"not defined for latents"),
    ],
)
def test_what_pages_cannot_hold_is_refused(arguments: tuple, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LatentPageFormat(*arguments)


@pytest.mark.parametrize("block_size", [16, 128])
def test_vllm_counts_the_same_bytes(block_size: int) -> None:
    plain = MLAAttentionSpec(
        block_size=block_size, num_kv_heads=1, head_size=576, dtype=torch.bfloat16
    )
    assert AscendCPUMLABackend.customize_spec(plain).page_size_bytes == 1152 * block_size
    for quantisation, token_bytes in ((Quantisation.C8D, 644), (Quantisation.C8S, 640)):
        spec = MLAAttentionSpec(
            block_size=block_size,
            num_kv_heads=1,
            head_size=576,
            dtype=torch.int8,
            kv_quant_mode=KVQuantMode.INT8_PER_TOKEN_HEAD,
        )
        backend = backend_of(AscendCPUMLABackend, quantisation, 64)
        told = backend.customize_spec(spec)
        assert told.page_size_bytes == token_bytes * block_size
        assert backend.customize_spec(told) == told  # vLLM may ask twice
