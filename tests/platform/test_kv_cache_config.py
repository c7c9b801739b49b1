"""What is refused, chosen and prepared for an int8 KV cache when vLLM configures an engine."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from processes import run_python
from real_checkpoints import checkpoint

from ascend_plugin.kv_cache.scales import LayerScales, save_kv_scales
from ascend_plugin.metrics_folder import FOLDER_VARIABLE
from ascend_plugin.model.tiny import write_tiny_llama

#: Configures engines one after the other; prints a JSON list of cache types or errors.
CONFIGURE = """
import json, os, sys
from vllm.engine.arg_utils import EngineArgs
told = []
for settings in json.loads(sys.argv[1]):
    try:
        config = EngineArgs(**settings).create_engine_config()
        scheme = getattr(config.quant_config, "kv_cache_scheme", None)
        told.append(f"{config.cache_config.cache_dtype} {scheme}")
    except Exception as error:
        told.append(f"{type(error).__name__}: {error}")
from prometheus_client import REGISTRY, generate_latest
metrics = generate_latest(REGISTRY).decode()
folder = os.environ.get("ASCEND_PLUGIN_METRICS", "")
print("RESULTS" + json.dumps([told, metrics, folder, os.path.isdir(folder)]))
"""


def _configure(engines: list[dict[str, Any]]) -> tuple[list[str], str, str, bool]:
    # Empty: an engine of another test in this process may have made a folder, which is not ours.
    env = {"HF_HUB_OFFLINE": "1", FOLDER_VARIABLE: ""}
    done = run_python(CONFIGURE, json.dumps(engines), env=env)
    assert done.returncode == 0, done.stderr
    return tuple(json.loads(done.stdout.rpartition("RESULTS")[2]))


def _engine(model: Path, dtype: str = "int8_per_token_head", **more: Any) -> dict[str, Any]:
    kv_cache = more.pop("kv_cache", {})
    return {
        "model": str(model),
        "dtype": "float32",
        "kv_cache_dtype": dtype,
        "additional_config": {"kv_cache": kv_cache},
        "skip_tokenizer_init": True,
        **more,
    }


def _scales(path: Path, heads: int = 2, dim: int = 32) -> str:
    ones = torch.ones(heads, dim)
    save_kv_scales(path, {0: LayerScales(ones, ones), 1: LayerScales(ones, ones)}, {})
    return str(path)


def _compressed(path: Path, kind: str) -> Path:
    write_tiny_llama(path, dtype="float32")
    config = json.loads((path / "config.json").read_text())
    scheme = {"num_bits": 8, "type": kind, "strategy": "tensor", "symmetric": True}
    config["quantization_config"] = {
        "quant_method": "compressed-tensors",
        "format": "dense",
        "config_groups": {},
        "ignore": [],
        "kv_cache_scheme": scheme,
    }
    (path / "config.json").write_text(json.dumps(config))
    return path


def _served(tmp_path: Path, model: Path, static: dict[str, str]) -> list[tuple[dict, str]]:
    """Return configurations that pass, and the cache's type and the scheme that are left."""
    int8, floats = _compressed(tmp_path / "int8", "int"), _compressed(tmp_path / "fp8", "float")
    return [
        (_engine(model), "int8_per_token_head None"),
        (_engine(model, kv_cache=static), "int8_per_token_head None"),
        (_engine(model, "auto"), "auto None"),
        (_engine(model, "auto", kv_cache={"huge_pages": False}), "auto None"),
        # fp8 goes where it goes without the plugin
        (_engine(model, "fp8"), "fp8 None"),
        (_engine(floats, "auto"), "auto {'num_bits': 8, 'type': 'float'"),
        # what the checkpoint says, unless the user says something else
        (_engine(int8, "auto"), "int8_per_token_head None"),
        (_engine(int8, "bfloat16"), "bfloat16 None"),
        (_engine(checkpoint("ms-w8a8-c8"), "auto"), "int8_per_token_head None"),
        (_engine(checkpoint("ms-w8a8-c8"), "bfloat16"), "bfloat16 None"),
        (_engine(checkpoint("ms-w8a8-dynamic"), "auto"), "auto None"),
    ]


def _refused(tmp_path: Path, model: Path, static: dict[str, str]) -> list[tuple[dict, str]]:
    """Return configurations that are refused, and what is said."""
    other = _scales(tmp_path / "other", heads=4)
    (tmp_path / "text").write_text("no scales")
    return [
        # settings that nothing would use
        (
            _engine(model, "auto", kv_cache={"variant": "c8d"}),
            "--additional-config sets kv_cache.variant='c8d', but --kv-cache-dtype is 'auto': "
            "these settings are for int8 caches. Add --kv-cache-dtype int8_per_token_head",
        ),
        (
            _engine(model, "fp8", kv_cache={**static, "precision": "fast"}),
            f"sets kv_cache.variant='c8s', kv_cache.scales='{static['scales']}', "
            "kv_cache.precision='fast', but --kv-cache-dtype is 'fp8'",
        ),
        (_engine(model, "auto", kv_cache={"layers": {"0": "c8d"}}), "kv_cache.layers={'0': 'c8d'}"),
        # what does not fit
        (
            _engine(model, attention_backend="CPU_ATTN"),
            "--kv-cache-dtype int8_per_token_head is served by the plugin's attention alone, and "
            "--attention-backend CPU_ATTN was asked for",
        ),
        (
            _engine(model, kv_cache={"variant": "c8s", "scales": str(tmp_path / "none")}),
            "none, named as KV scales, is not a file. Make it with 'ascend-plugin calibrate kv",
        ),
        (
            _engine(model, kv_cache={"variant": "c8s", "scales": str(tmp_path / "text")}),
            "text is not a safetensors file",
        ),
        (
            _engine(model, kv_cache={"variant": "c8s", "scales": other}),
            "layers.0 has scales for 4 kv heads of 32 channels, the model has 2 kv heads of 32 "
            "(before tensor parallel sharding). Use scales that were made from this model.",
        ),
        (
            _engine(model, kv_cache={"layers": {"2": "auto"}}),
            "kv_cache.layers has the pattern '2', but the model has layers 0 to 1; negative",
        ),
        (
            _engine(model, kv_cache={"layers": {"-1-0": "auto"}}),
            "the range '-1-0', which holds no layer: 1 comes after 0",
        ),
    ]


def test_configurations(tmp_path: Path) -> None:
    model = write_tiny_llama(tmp_path / "model", dtype="float32")
    static = {"variant": "c8s", "scales": _scales(tmp_path / "scales")}
    cases = _served(tmp_path, model, static) + _refused(tmp_path, model, static)
    told, metrics, folder, exists = _configure([engine for engine, _ in cases])
    for got, (_, wanted) in zip(told, cases, strict=True):
        assert wanted in got
    assert "ascend_plugin:kv_cache_patched_total" in metrics
    assert exists, "the folder of the counters"
    assert not Path(folder).exists(), "it is removed when the process ends"
