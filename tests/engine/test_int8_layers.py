"""Layers of different variants in one engine, and how many blocks the memory then holds."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from engines import EngineProcess
from int8_engines import Int8Models
from prompts import tokens
from tiny_engines import TinyModels, settings

from ascend_plugin.kv_cache import PageFormat
from ascend_plugin.kv_cache.scales import LayerScales, save_kv_scales
from ascend_plugin.kv_cache.variants import QUANTISATIONS

pytestmark = pytest.mark.engine

PROMPTS = [tokens(length, seed=i) for i, length in enumerate((3, 40, 128, 150, 260))]
RUN = {"prompts": PROMPTS, "max_tokens": 16}
AGAIN = {"prompts": PROMPTS[::-1], "max_tokens": 16}


def _page_bytes(variant: str, block_size: int) -> int:
    quantisation = QUANTISATIONS[variant]
    dtype = torch.int8 if quantisation else torch.float32
    return PageFormat(dtype, block_size, 2, 64, quantisation).page_bytes


@pytest.mark.parametrize(("variant", "block_size"), [("c8d", 128), ("c8s", 16), ("c8p", 32)])
def test_memory_is_filled_to_the_byte(
    plugin: EngineProcess, int8: Int8Models, variant: str, block_size: int
) -> None:
    model = int8("llama")
    block = _page_bytes(variant, block_size) * model.offline.layers
    count = 4096 // block_size + 5
    for spare, fits in ((block - 1, count), (-1, count - 1)):
        engine = model.engine(
            variant, block_size=block_size, kv_cache_memory_bytes=count * block + spare
        )
        answer = plugin.run(engine, {"prompts": [tokens(40)], "max_tokens": 2})
        assert answer.made_of["num_blocks"] == fits


MIXED = {
    "first unquantised": ({"0": "auto"}, ("auto", "c8d", "c8d", "c8d")),
    "last of another kind": ({"-1": "c8s"}, ("c8d", "c8d", "c8d", "c8s")),
    "every kind": (
        {"0": "auto", "1-2": "c8p", "*.layers.2.*": "c8s"},
        ("auto", "c8p", "c8s", "c8d"),
    ),
}


@pytest.mark.parametrize("name", MIXED)
def test_mixed_layers(plugin: EngineProcess, int8: Int8Models, name: str) -> None:
    model = int8("four layers", layers=4)
    layers, variants = MIXED[name]
    block = sum(_page_bytes(variant, 32) for variant in variants)
    engine = model.engine(
        "c8d", {"layers": layers}, block_size=32, kv_cache_memory_bytes=150 * block + 17
    )
    answer = plugin.run(engine, RUN, AGAIN)
    assert answer.made_of["num_blocks"] == 150
    kinds = {"torch.float32" if variant == "auto" else "torch.int8" for variant in variants}
    assert set(answer.made_of["dtypes"]) == kinds
    assert set(answer.counters) == set(variants) - {"auto"}
    caches = model.caches(*variants, block_size=32)
    model.check(answer, PROMPTS, caches, 0)
    model.check(answer, AGAIN["prompts"], caches, 1)


def test_vllms_own_list_of_layers(plugin: EngineProcess, int8: Int8Models) -> None:
    model = int8("four layers", layers=4)
    engine = model.engine("c8d", block_size=32, kv_cache_dtype_skip_layers=["1", "3"])
    answer = plugin.run(engine, RUN)
    model.check(answer, PROMPTS, model.caches("c8d", "auto", "c8d", "auto", block_size=32))


@pytest.mark.parametrize("layers", [{}, {"0": "auto"}, {"1": "auto"}, {"0-1": "auto"}], ids=str)
def test_windows_in_some_layers(plugin: EngineProcess, tiny: TinyModels, layers: dict) -> None:
    """Here vLLM makes pages of all layers equal: with larger blocks, or with unused bytes."""
    shape = {"architecture": "gemma2", "layers": 4, "sliding_window": 40, "attn_softcap": 3.0}
    model = tiny("windows in some layers", **shape)
    engine = settings(model, block_size=32, max_num_batched_tokens=64)
    run = {"prompts": PROMPTS, "score": True}
    exact = plugin.run(engine, run).runs[0]["scores"]
    config = {"kv_cache": {"layers": layers}}
    int8 = {"kv_cache_dtype": "int8_per_token_head", "additional_config": config}
    answer = plugin.run(engine | int8, run, run)
    assert "torch.int8" in answer.made_of["dtypes"]
    assert ("torch.float32" in answer.made_of["dtypes"]) == bool(layers)
    for again in (0, 1):  # the second time on blocks that have been used
        scores = answer.runs[again]["scores"]
        pairs = [p for both in zip(exact, scores, strict=True) for p in zip(*both, strict=True)]
        assert 0 < sum(abs(a - b) for a, b in pairs) / len(pairs) < 0.06


def test_blocks_that_become_too_large_are_refused(
    plugin: EngineProcess, tiny: TinyModels, tmp_path: Path
) -> None:
    """At start, not at the first request: four int8 tokens take the bytes of one of float32."""
    model = tiny("windows", architecture="gemma2", layers=4, sliding_window=40)
    ones = torch.ones(2, 64)
    save_kv_scales(tmp_path / "scales", dict.fromkeys(range(4), LayerScales(ones, ones)), {})
    config = {"variant": "c8s", "scales": str(tmp_path / "scales"), "layers": {"0": "auto"}}
    engine = settings(
        model,
        block_size=128,
        kv_cache_dtype="int8_per_token_head",
        additional_config={"kv_cache": config},
    )
    with pytest.raises(RuntimeError, match=r"block size 512 is not supported.*Change --block-size"):
        plugin.run(engine, RUN)
