"""Static scales that do not fit a model are refused when the engine loads it, with a remedy."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from engines import ENVIRONMENT
from processes import run_python
from safetensors.torch import load_file, save_file

from ascend_plugin.kv_cache.scales import LayerScales, save_kv_scales
from ascend_plugin.model.tiny import write_tiny_llama

pytestmark = pytest.mark.engine

#: Starts one engine after the other; prints a JSON list of what went wrong.
START = """
import gc, json, sys
from vllm import LLM
from vllm.distributed import cleanup_dist_env_and_memory
told = []
for settings in json.loads(sys.argv[1]):
    gc.freeze()  # as in engine_server.py
    try:
        llm = LLM(**settings)
        llm.llm_engine.engine_core.shutdown()
        told.append("started")
        del llm
    except Exception as error:
        told.append(f"{type(error).__name__}: {error}")
    cleanup_dist_env_and_memory()
print("RESULTS" + json.dumps(told))
"""


def _start(*engines: dict[str, Any]) -> list[str]:
    return _start_and_listen(*engines)[0]


def _start_and_listen(*engines: dict[str, Any]) -> tuple[list[str], str]:
    """Return what became of each engine, and everything that was logged."""
    done = run_python(START, json.dumps(engines), env=ENVIRONMENT, timeout=400)
    assert done.returncode == 0, done.stderr[-4000:]
    logged, _, results = done.stdout.rpartition("RESULTS")
    return json.loads(results), logged + done.stderr


def _engine(model: Path, **kv_cache: Any) -> dict[str, Any]:
    return {
        "model": str(model),
        "dtype": "float32",
        "kv_cache_dtype": "int8_per_token_head",
        "additional_config": {"kv_cache": kv_cache},
        "skip_tokenizer_init": True,
        "enforce_eager": True,
        "max_model_len": 512,
        "kv_cache_memory_bytes": 1 << 24,
    }


def _model(path: Path, tensors: dict[str, torch.Tensor] | None = None, **config: Any) -> Path:
    """Write a model of two layers with 2 kv heads of 32, and more tensors."""
    write_tiny_llama(path, dtype="float32")
    weights = load_file(path / "model.safetensors")
    save_file(weights | (tensors or {}), path / "model.safetensors", {"format": "pt"})
    written = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(written | config))
    return path


def _modelslim(scale: torch.Tensor, offset: float = 0.0, layers: int = 2) -> dict:
    return {
        f"model.layers.{i}.self_attn.{side}_proj.kv_cache_{part}": value.clone()
        for i in range(layers)
        for side in "kv"
        for part, value in (("scale", scale), ("offset", torch.full_like(scale, offset)))
    }


def _scales(path: Path, heads: int = 2, dim: int = 32, layers: int = 2, **error: float) -> str:
    ones = torch.ones(heads, dim)
    save_kv_scales(path, {i: LayerScales(ones, ones, **error) for i in range(layers)}, {})
    return str(path)


@pytest.mark.slow
def test_refusals(tmp_path: Path) -> None:
    plain = _model(tmp_path / "plain")
    good = _modelslim(torch.full((64,), 0.05))
    nan = good | {"model.layers.1.self_attn.v_proj.kv_cache_scale": torch.full((64,), torch.nan)}
    del (half := dict(good))["model.layers.0.self_attn.v_proj.kv_cache_scale"]
    slim = _model(tmp_path / "slim", good)
    cases = [
        (_engine(plain, variant="c8s"), "the checkpoint has none. Make them with 'ascend-plugin"),
        (
            _engine(plain, variant="c8s", scales=_scales(tmp_path / "one", layers=1)),
            "one has no scales for layer 1; it has 0. Calibrate this model",
        ),
        (
            _engine(plain, variant="c8s", scales=_scales(tmp_path / "heads", heads=4)),
            "layers.0 has scales for 4 kv heads of 32 channels, the model has 2 kv heads of 32",
        ),
        (
            _engine(plain, variant="c8p", scales=_scales(tmp_path / "plain scales")),
            "does not say that mean. Set kv_cache.patch_threshold",
        ),
        (
            _engine(plain, layers={"*.layer.0.*": "auto"}),
            "'*.layer.0.*', which matches no layer; names are like 'model.layers.0.self_attn.attn'",
        ),
        (
            _engine(_model(tmp_path / "offset", _modelslim(torch.ones(64), offset=3))),
            "kv_cache_offset is not zero: the checkpoint's KV cache is asymmetric",
        ),
        (
            _engine(_model(tmp_path / "heads of another", _modelslim(torch.ones(128)))),
            "kv_cache_scale has shape [128]; the model has 2 kv heads of 32 (before tensor",
        ),
        (
            _engine(_model(tmp_path / "some layers", _modelslim(torch.ones(64), layers=1))),
            "the checkpoint has no scales for layer 1; it has 0.",
        ),
        (_engine(_model(tmp_path / "nan", nan)), "v_proj.kv_cache_scale is nan at kv head 0"),
        (_engine(_model(tmp_path / "half", half)), "KV scales for layer 0, but none for V"),
        (_engine(slim, variant="c8p"), "the checkpoint does not say that mean"),
        (_engine(slim, variant="c8p", patch_threshold=0.1), "started"),
        (_engine(slim), "started"),
    ]
    for told, (_, message) in zip(_start(*(engine for engine, _ in cases)), cases, strict=True):
        assert message in told


@pytest.mark.slow
def test_scales_that_nobody_uses_are_mentioned(tmp_path: Path) -> None:
    plain = _model(tmp_path / "plain")
    slim = _model(tmp_path / "slim", _modelslim(torch.full((64,), 0.05)))
    reminder = "static scales for an int8 KV cache, and the cache is auto: they are not used"
    for model, told in ((plain, False), (slim, True)):
        engine = _engine(model) | {"kv_cache_dtype": "auto", "additional_config": {}}
        results, logged = _start_and_listen(engine)
        assert results == ["started"]
        assert (reminder in " ".join(logged.split())) is told
