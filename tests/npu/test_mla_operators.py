"""The operators of latent attention (MLA) on the NPU, against attention in float64."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from latent_cases import LatentBatch, LatentCase, assert_close, make_batch, oracle

from ascend_plugin.kv_cache import LatentPageFormat
from ascend_plugin.ops.dispatch import UnsupportedRequestError
from ascend_plugin.ops.latent import latent_planes, latent_scales
from ascend_plugin.ops.mla_attention import mla_attention
from ascend_plugin.ops.mla_cache_write import mla_cache_write
from ascend_plugin.ops.npu.latent_planes import page_latents
from ascend_plugin.ops.page_layout import Arrangement

DEEPSEEK = {"latent_dim": 512, "rotary_dim": 64, "dtype": torch.bfloat16}

RAGGED = ((1, 20), (7, 200), (30, 30), (2, 129))

CASES = {
    "decode": LatentCase(((1, 1), (1, 17), (1, 200)), block_size=128, **DEEPSEEK),
    "verification": LatentCase(((4, 20), (4, 133)), heads=16, block_size=128, **DEEPSEEK),
    "prefill": LatentCase(((40, 40), (3, 3)), block_size=16, **DEEPSEEK),
    "all at once, and chunks": LatentCase(RAGGED, block_size=64, **DEEPSEEK),
    "odd blocks": LatentCase(RAGGED, block_size=48, **DEEPSEEK),
    "float16": LatentCase(RAGGED, block_size=128, **(DEEPSEEK | {"dtype": torch.float16})),
    "one head": LatentCase(((2, 9),), heads=1, **DEEPSEEK),
    "the most heads": LatentCase(((1, 33), (2, 20)), heads=128, **DEEPSEEK),
    "not causal": LatentCase(((5, 5), (3, 90)), causal=False, **DEEPSEEK),
    "padding": LatentCase(((1, 20), (2, 30)), padding=5, **DEEPSEEK),
    "strided": LatentCase(((1, 20), (2, 30)), strided=True, **DEEPSEEK),
    "no context": LatentCase(((1, 20), (2, 0)), **DEEPSEEK),
}


def draw(case: LatentCase) -> LatentBatch:
    """Return a batch that leaves block 0 alone, as vLLM does: padding may write scales there."""
    batch = make_batch(case)
    batch.block_table += 1
    batch.pages = torch.cat((batch.pages[:1], batch.pages))
    return batch


def page_of(case: LatentCase) -> LatentPageFormat:
    plain = case.page
    shape = (plain.block_size, plain.latent_dim, plain.rotary_dim)
    return LatentPageFormat(plain.dtype, *shape, plain.quantisation, Arrangement.PLANE_MAJOR)


def poisoned(page: LatentPageFormat, blocks: int, device: torch.device) -> torch.Tensor:
    raw = torch.full((blocks * page.page_bytes,), 0xFF, dtype=torch.uint8)  # NaN as any float
    return raw.view(page.dtype).view(page.pages_shape(blocks)).to(device)


def slots_of(batch: LatentBatch, i: int, size: int) -> torch.Tensor:
    places = torch.arange(batch.latents[i].shape[0])
    return batch.block_table[i, places // size].long() * size + places % size


def written(batch: LatentBatch, device: torch.device) -> torch.Tensor:
    """Write the batch's tokens into poisoned pages, with padding, from slices of wider rows."""
    case = batch.case
    page = page_of(case)
    pages = poisoned(page, batch.pages.shape[0], device)
    for i, (latents, rotary) in enumerate(zip(batch.latents, batch.rotary, strict=True)):
        both = torch.cat((latents, rotary), -1).to(case.dtype)
        wide = torch.cat((both, torch.ones(2, both.shape[1], dtype=case.dtype))).to(device)
        slots = torch.cat((slots_of(batch, i, case.block_size), torch.tensor([-1])))
        mla_cache_write(
            wide[:, : case.latent_dim],
            wide[:, case.latent_dim :],
            pages,
            slots.to(device),
            page.plane_layout(),
            channel_scales=batch.options.get("channel_scales"),
        )
    return pages


def attend(batch: LatentBatch, pages: torch.Tensor, device: torch.device) -> None:
    out = batch.out.to(device)
    mla_attention(
        batch.query.to(device),
        batch.query_rotary.to(device),
        pages,
        out,
        batch.query_start_loc,
        batch.seq_lens,
        batch.block_table.to(device),
        page_of(batch.case).plane_layout(),
        scale=batch.options["scale"],
        causal=batch.options["causal"],
        channel_scales=batch.options.get("channel_scales"),
    )
    batch.out = out.cpu()


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_attention_over_latents(case: LatentCase, device: torch.device) -> None:
    batch = draw(case)
    attend(batch, written(batch, device), device)
    assert_close(batch)


INT8 = {
    "decode": LatentCase(((1, 1), (1, 17), (1, 200)), block_size=128, **DEEPSEEK),
    "all at once, and chunks": LatentCase(RAGGED, block_size=64, heads=16, **DEEPSEEK),
    "odd blocks": LatentCase(RAGGED, block_size=48, **DEEPSEEK),
    "float16": LatentCase(RAGGED, block_size=16, **(DEEPSEEK | {"dtype": torch.float16})),
}


@pytest.mark.parametrize("variant", ["c8d", "c8s"])
@pytest.mark.parametrize("case", INT8.values(), ids=INT8)
def test_attention_over_int8_latents(case: LatentCase, variant: str, device: torch.device) -> None:
    """Pages mean the values that are quantised, up to half a code; they are bfloat16's anyway."""
    batch = draw(replace(case, variant=variant))
    pages = written(batch, device)
    assert pages.dtype == torch.int8
    attend(batch, pages, device)
    want, inside = oracle(batch), int(batch.query_start_loc[-1])
    got = batch.out[:inside].double()
    assert bool(got.isfinite().all())
    assert float((got - want[:inside]).norm() / want[:inside].norm()) < 2e-2


@pytest.mark.parametrize("variant", ["c8d", "c8s"])
def test_codes_are_those_of_the_cpu(variant: str, device: torch.device) -> None:
    """Up to one: scales are computed in another order."""
    batch = draw(replace(INT8["odd blocks"], variant=variant))
    page = page_of(batch.case)
    planes = page_latents(written(batch, device).cpu(), page.plane_layout())
    on_cpu = batch.case.page
    for i, (latents, rotary) in enumerate(zip(batch.latents, batch.rotary, strict=True)):
        pages = torch.zeros(on_cpu.pages_shape(batch.pages.shape[0]), dtype=torch.int8)
        slots = slots_of(batch, i, batch.case.block_size)
        rows = [each.to(batch.case.dtype) for each in (latents, rotary)]
        scales = batch.options.get("channel_scales")
        mla_cache_write(*rows, pages, slots, on_cpu.layout(), channel_scales=scales)
        size, blocks = batch.case.block_size, slots // batch.case.block_size
        mine = planes.latents.squeeze(1).transpose(1, 2)[blocks, slots % size]
        theirs = latent_planes(pages, on_cpu.layout()).transpose(1, 2)[blocks, slots % size]
        assert int((mine.int() - theirs.int()).abs().max()) <= 1
        if planes.scales is not None:
            want = latent_scales(pages, on_cpu.layout())[blocks, slots % size]
            torch.testing.assert_close(planes.scales[blocks, slots % size], want)


def test_latents_lie_where_the_pages_say(device: torch.device) -> None:
    """Byte by byte, as docs/pages.md draws it: the package's own views are not used."""
    batch = draw(CASES["odd blocks"])
    size, blocks = batch.case.block_size, batch.pages.shape[0]
    raw = written(batch, device).cpu().view(-1)
    latents = raw[: blocks * size * 512].view(blocks, 32, size, 16)
    rotary = raw[blocks * size * 512 :].view(blocks, 4, size, 16)
    kept = torch.zeros(blocks * size, dtype=torch.bool)
    for i in range(len(batch.latents)):
        slots = slots_of(batch, i, size)
        kept[slots] = True
        for array, wanted in ((latents, batch.latents[i]), (rotary, batch.rotary[i])):
            rows = array.transpose(1, 2)[slots // size, slots % size].flatten(1)
            assert torch.equal(rows.double(), wanted)
    for array in (latents, rotary):
        free = array.transpose(1, 2).reshape(blocks * size, -1)[~kept]
        assert bool(free.isnan().all())


def test_nothing_to_do(device: torch.device) -> None:
    batch = draw(LatentCase((), **DEEPSEEK))
    pages = poisoned(page_of(batch.case), 2, device)
    attend(batch, pages, device)
    rows = torch.ones(2, 576, dtype=torch.bfloat16, device=device)
    layout, none = page_of(batch.case).plane_layout(), torch.zeros(0, dtype=torch.int64)
    mla_cache_write(rows[:, :512], rows[:, 512:], pages, none.to(device), layout)
    mla_cache_write(
        rows[:, :512], rows[:, 512:], pages, torch.full((2,), -1, device=device), layout
    )
    assert bool(pages.isnan().all())


def test_moving_the_regions_of_a_block_moves_it(device: torch.device) -> None:
    batch = draw(LatentCase(((1, 12),), **DEEPSEEK))
    pages = written(batch, device)
    raw, blocks = pages.view(-1).view(torch.uint8), pages.shape[0]
    old = int(batch.block_table[0, 0])
    new = (old + 1) % blocks
    for region in page_of(batch.case).regions(blocks):
        source, target = (region.offset + block * region.stride for block in (old, new))
        raw[target : target + region.nbytes] = raw[source : source + region.nbytes].clone()
        raw[source : source + region.nbytes] = 0xFF
    batch.block_table[0, 0] = new
    attend(batch, pages, device)
    assert_close(batch)


REFUSED = {
    "latents": (
        LatentCase(((1, 20),), latent_dim=256, rotary_dim=64, dtype=torch.bfloat16),
        r"kv_lora_rank 256 with qk_rope_head_dim 64; the fused attention reads 512 with 64",
    ),
    "float32": (
        LatentCase(((1, 20),), latent_dim=512, rotary_dim=64),
        r"torch\.float32 tokens; allowed are bf16 and fp16",
    ),
    "heads": (
        LatentCase(((1, 20),), heads=12, **DEEPSEEK),
        r"12 query heads on a device; .* powers of two up to 128: change --tensor-parallel-size",
    ),
}


@pytest.mark.parametrize(("case", "reason"), REFUSED.values(), ids=REFUSED)
def test_what_no_path_serves_is_refused(
    case: LatentCase, reason: str, device: torch.device
) -> None:
    batch = draw(case)
    with pytest.raises(UnsupportedRequestError, match=reason):
        attend(batch, written(batch, device), device)


def test_pages_of_another_layout_are_refused(device: torch.device) -> None:
    case = CASES["decode"]
    batch = draw(case)
    layout = page_of(case).plane_layout()
    rows = torch.ones(1, 576, dtype=case.dtype, device=device)
    slots = torch.zeros(1, dtype=torch.int64, device=device)

    def write(pages: torch.Tensor, layout: tuple[int, ...], slots: torch.Tensor = slots) -> None:
        mla_cache_write(rows[:, :512], rows[:, 512:], pages, slots, layout)

    pages = poisoned(page_of(case), 4, device)
    with pytest.raises(ValueError, match=r"7 numbers, 4 are needed .*\.plane_layout\(\)"):
        write(pages, case.page.layout())
    with pytest.raises(ValueError, match=r"contiguous pages, as in vLLM's KV cache layout LBHNC"):
        write(pages[::2], layout)
    with pytest.raises(ValueError, match=r"must be \[blocks, 128 \(block size\), content\]"):
        write(pages[:, :64], layout)
    with pytest.raises(ValueError, match=r"holds 1024 bytes, 1152 are needed"):
        write(pages[..., :512].contiguous(), layout)
    with pytest.raises(ValueError, match=r"slot_mapping names 2 tokens, latents has 1"):
        write(pages, layout, slots.repeat(2))
    batch.query_rotary = batch.query_rotary[..., :32]
    with pytest.raises(ValueError, match=r"query_rotary must be \[tokens, heads, 64\]"):
        attend(batch, pages, device)
