"""What the operators of latent attention refuse, and what they say."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from latent_cases import LatentCase, make_batch

from ascend_plugin.ops.mla_attention import mla_attention
from ascend_plugin.ops.mla_cache_write import mla_cache_write

CASE = LatentCase(((1, 20), (2, 30)))
C8S = LatentCase(((1, 20), (2, 30)), variant="c8s")


def _attend(case: LatentCase = CASE, **changes: Any) -> None:
    batch = make_batch(case)
    names = ("query", "query_rotary", "pages", "out", "query_start_loc", "seq_lens", "block_table")
    arguments = {name: getattr(batch, name) for name in names}
    arguments["layout"] = case.page.layout()
    for name, change in changes.items():
        known = arguments.get(name, batch.options.get(name))
        arguments[name] = change(known) if callable(change) else change
    mla_attention(**{**batch.options, **arguments})


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "query's width": ({"query": lambda q: q[..., :48]}, r"query must be \[tokens, heads, 64\]"),
    "query's rank": ({"query": lambda q: q[0]}, r"query must be \[tokens, heads, 64\]"),
    "query's type": ({"query": lambda q: q.double()}, r"float64; allowed are float32"),
    "rotary's width": (
        {"query_rotary": lambda q: q.repeat(1, 1, 2)},
        r"query_rotary must be \[tokens, heads, 16\]",
    ),
    "rotary's heads": ({"query_rotary": lambda q: q[:, :2]}, r"query_rotary \(\[3, 2, 16\]"),
    "rotary's tokens": ({"query_rotary": lambda q: q[:2]}, r"query_rotary \(\[2, 4, 16\]"),
    "rotary's type": ({"query_rotary": lambda q: q.half()}, r"must have the tokens, heads and"),
    "out's type": ({"out": lambda out: out.half()}, r"out .*float16.* must have the shape"),
    "out's heads": ({"out": lambda out: out[:, :2]}, r"out \(\[3, 2, 64\]"),
    "transposed rows": (
        {"query": lambda q: q.transpose(0, 2).contiguous().transpose(0, 2)},
        r"query must be contiguous in its last dimension",
    ),
    "pages' rank": ({"pages": lambda p: p[:, None]}, r"pages of latents must be \[blocks, 16"),
    "pages' bytes": (
        {"pages": lambda p: p[..., :64].contiguous()},
        r"holds 4096 bytes, its layout",
    ),
    "pages' order": (
        {"pages": lambda p: p.transpose(1, 2).contiguous().transpose(1, 2)},
        r"pages must be contiguous within a block",
    ),
    "starts": ({"query_start_loc": lambda s: s + 1}, r"query_start_loc must rise from 0"),
    "lengths": ({"seq_lens": lambda s: s * 9}, r"seq_lens must lie within 0\.\.64"),
    "table": ({"block_table": lambda t: t[:1]}, r"2 seq_lens need 3 query_start_loc and 2 rows"),
    "fast": ({"fast": True}, r"fast=True is for int8 pages"),
    "scales": ({"channel_scales": torch.ones(64)}, r"belong to c8s pages"),
    "layout's length": ({"layout": [1, 2, 3]}, r"layout has 3 numbers, 7 are needed"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_attention_refuses(name: str) -> None:
    changes, message = REFUSED[name]
    with pytest.raises(ValueError, match=message):
        _attend(**changes)


LAYOUTS: dict[str, tuple[dict[str, int], str]] = {
    "latent": ({"latent_dim": 40}, r"kv_lora_rank\) 40 is not supported; allowed are multiples"),
    "wide latent": ({"latent_dim": 528}, r"528 is not supported; .* up to 512"),
    "rotary": ({"rotary_dim": 24}, r"qk_rope_head_dim\) 24 is not supported"),
    "block": ({"block_size": 24}, r"block size 24 is not supported"),
    "rotary inside latents": ({"rotary_offset": 64}, r"rotary_offset 64 does not place"),
    "rotary behind the page": ({"rotary_offset": 5000}, r"rotary_offset 5000 does not place"),
    "patches": (
        {"quantisation": 3},
        r"quantisation 3 is not defined for latents; allowed are none",
    ),
    "c8d of floats": ({"quantisation": 1}, r"c8d pages hold int8, got torch.float32"),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_attention_refuses_layouts(name: str) -> None:
    changes, message = LAYOUTS[name]
    with pytest.raises(ValueError, match=message):
        _attend(layout=CASE.page.layout()._replace(**changes))


@pytest.mark.parametrize(
    ("scales", "message"),
    [
        (None, r"c8s pages need channel_scales, float32 \[64\]"),
        (torch.ones(32), r"channel_scales must be float32 \[64\]"),
        (torch.ones(64).double(), r"channel_scales must be float32 \[64\]"),
        (torch.ones(128)[::2], r"channel_scales must be contiguous"),
    ],
)
def test_static_scales_are_checked(scales: torch.Tensor | None, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        _attend(C8S, channel_scales=scales)


WRITES: dict[str, tuple[dict[str, Any], str]] = {
    "latents' width": ({"latents": torch.ones(3, 48)}, r"latents must be \[tokens, 64\]"),
    "rotary's rank": ({"rotary": torch.ones(3, 1, 16)}, r"rotary must be \[tokens, 16\]"),
    "types differ": ({"rotary": torch.ones(3, 16).half()}, r"same number of tokens and dtype"),
    "tokens differ": ({"rotary": torch.ones(2, 16)}, r"same number of tokens and dtype"),
    "too many slots": ({"slot_mapping": torch.arange(4)}, r"slot_mapping names 4 tokens"),
    "slots' type": ({"slot_mapping": torch.arange(3).int()}, r"1-dimensional torch.int64"),
    "counters": ({"counters": torch.zeros(3)}, r"counters must be int64 \[4\]"),
    "scales": ({"channel_scales": torch.ones(64)}, r"belong to c8s pages"),
}


@pytest.mark.parametrize("name", WRITES)
def test_writes_refuse(name: str) -> None:
    changes, message = WRITES[name]
    batch = make_batch(CASE)
    arguments: dict[str, Any] = {
        "latents": torch.ones(3, 64),
        "rotary": torch.ones(3, 16),
        "pages": batch.pages,
        "slot_mapping": torch.arange(3),
        "layout": CASE.page.layout(),
    }
    with pytest.raises(ValueError, match=message):
        mla_cache_write(**{**arguments, **changes})
