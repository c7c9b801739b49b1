"""Static KV scales inside a checkpoint, as ModelSlim and llm-compressor write them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from engines import EngineProcess
from int8_engines import Int8Model, Int8Models
from offline_llama import FakeCache
from prompts import tokens
from safetensors.torch import load_file, save_file
from tiny_engines import settings

pytestmark = pytest.mark.engine

PROMPTS = [tokens(length, seed=i) for i, length in enumerate((5, 40, 129, 200))]
RUN = {"prompts": PROMPTS, "max_tokens": 12}
ATTENTION = "model.layers.{i}.self_attn."


def _with_tensors(
    model: Int8Model, path: Path, tensors: dict[str, torch.Tensor], scheme: dict | None = None
) -> str:
    shutil.copytree(model.path, path)
    weights = load_file(path / "model.safetensors")
    save_file(weights | tensors, path / "model.safetensors", {"format": "pt"})
    if scheme is not None:
        config = json.loads((path / "config.json").read_text())
        config["quantization_config"] = {
            "quant_method": "compressed-tensors",
            "format": "dense",
            "config_groups": {},
            "ignore": ["lm_head"],
            "kv_cache_scheme": scheme,
            "quantization_status": "compressed",
        }
        (path / "config.json").write_text(json.dumps(config))
    return str(path)


def _caches(scales: list[torch.Tensor]) -> list[FakeCache]:
    return [FakeCache("c8s", scale) for scale in scales]


@pytest.mark.parametrize("dtype", ["auto", "int8_per_token_head"])
def test_modelslim(plugin: EngineProcess, int8: Int8Models, tmp_path: Path, dtype: str) -> None:
    """Its scales are used as soon as the cache is int8, and are no obstacle before."""
    model = int8("llama")
    tensors = {
        f"{ATTENTION.format(i=i)}{side}_proj.kv_cache_{part}": value.flatten().contiguous()
        for i, layer in model.layers.items()
        for side, scale in (("k", layer.k_scale), ("v", layer.v_scale))
        for part, value in (("scale", scale), ("offset", torch.zeros_like(scale)))
    }
    path = _with_tensors(model, tmp_path / "model", tensors)
    answer = plugin.run(settings(path, kv_cache_dtype=dtype), RUN)
    if dtype == "auto":
        assert answer.made_of["dtypes"] == ["torch.float32"]
        model.check(answer, PROMPTS, model.caches("auto"))
    else:
        assert list(answer.counters) == ["c8s"]
        model.check(answer, PROMPTS, model.caches("c8s"))


def _scheme(strategy: str) -> dict[str, Any]:
    return {
        "num_bits": 8,
        "type": "int",
        "strategy": strategy,
        "symmetric": True,
        "dynamic": False,
    }


@pytest.mark.parametrize("strategy", ["tensor", "attn_head"])
def test_compressed_tensors(
    plugin: EngineProcess, int8: Int8Models, tmp_path: Path, strategy: str
) -> None:
    """Stock vLLM refuses such a checkpoint; here it chooses the type of the cache, as fp8 does."""
    model = int8("llama")
    tensors, scales = {}, []
    for i, layer in model.layers.items():
        wide = []
        for side, scale in (("k", layer.k_scale), ("v", layer.v_scale)):
            best = scale.amax() if strategy == "tensor" else scale.amax(-1)
            best = best.bfloat16().reshape(-1, *((1, 1) if strategy == "attn_head" else ()))
            tensors[f"{ATTENTION.format(i=i)}{side}_scale"] = best
            tensors[f"{ATTENTION.format(i=i)}{side}_zero_point"] = torch.zeros_like(
                best, dtype=torch.int8
            )
            wide.append(best.float().reshape(-1, 1).expand(scale.shape))
        scales.append(torch.stack(wide))
    path = _with_tensors(model, tmp_path / "model", tensors, _scheme(strategy))
    answer = plugin.run(settings(path), RUN)
    assert answer.made_of["dtypes"] == ["torch.int8"]
    assert list(answer.counters) == ["c8s"]
    model.check(answer, PROMPTS, _caches(scales))
    unquantised = plugin.run(settings(path, kv_cache_dtype="bfloat16"), RUN)
    assert unquantised.made_of["dtypes"] == ["torch.bfloat16"]
