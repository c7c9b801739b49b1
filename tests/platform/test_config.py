"""``--additional-config``: defaults, and refusals that name path, value and what is allowed."""

from __future__ import annotations

import pytest

from ascend_plugin.config import VLLM_KEYS, ConfigError, PluginConfig, parse_config


def test_defaults() -> None:
    config = parse_config({})
    assert config == PluginConfig()
    assert config.device == "auto"
    assert config.ops.implementation == "auto"
    assert config.kv_cache.huge_pages is True


def test_every_setting() -> None:
    config = parse_config(
        {
            "device": "cpu",
            "ops": {"implementation": "reference"},
            "kv_cache": {
                "huge_pages": False,
                "variant": "c8p",
                "scales": "kv_scales.safetensors",
                "patch_code": "e3m0",
                "patch_threshold": 0.05,
                "layers": {"0": "auto", "1-3": "c8d", "*.layers.9.*": "c8s"},
                "precision": "fast",
            },
            "speculation": {
                "adaptive": False,
                "draft_head": {"tokens": 4096, "file": "head.safetensors"},
            },
        }
    )
    assert config.device == "cpu"
    assert config.ops.implementation == "reference"
    assert config.speculation.draft_head.tokens == 4096
    assert config.speculation.adaptive is False
    assert config.kv_cache.huge_pages is False
    assert config.kv_cache.variant == "c8p"
    assert config.kv_cache.patch_threshold == 0.05
    assert list(config.kv_cache.layers) == ["0", "1-3", "*.layers.9.*"]
    assert set(config.kv_cache.int8_settings()) == set(type(config.kv_cache).model_fields) - {
        "huge_pages"
    }
    assert parse_config({}).kv_cache.int8_settings() == {}


def test_keys_of_vllm_are_left_alone() -> None:
    assert parse_config(dict.fromkeys(VLLM_KEYS, "anything")) == PluginConfig()


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (
            {"speculation": {"draft_head": {"tokens": -1}}},
            "speculation.draft_head.tokens=-1: Input should be greater than or equal to 0.",
        ),
        (
            {"speculation": {"draft_head": {"tokens": 0, "file": "f"}}},
            "speculation.draft_head.file='f' is given, but tokens=0 asks for the whole",
        ),
        (
            {"speculation": {"draft_head": {"token": 1}}},
            "speculation.draft_head.token is unknown (value 1); allowed here: file, tokens.",
        ),
        (
            {"devise": "cpu"},
            "devise is unknown (value 'cpu'); allowed here: device, kv_cache, ops, speculation, "
            "weights.",
        ),
        (
            {"ops": {"implementatoin": "native"}},
            "ops.implementatoin is unknown (value 'native'); allowed here: implementation.",
        ),
        (
            {"kv_cache": {"huge_pages": True, "dtype": "int8"}},
            "kv_cache.dtype is unknown (value 'int8'); allowed here: huge_pages, layers, "
            "patch_code, patch_threshold, precision, scales, variant.",
        ),
        ({"kv_cache": {"variant": "c8"}}, "kv_cache.variant='c8': Input should be 'c8d', 'c8s' or"),
        (
            {"kv_cache": {"layers": {"0": "bf16"}}},
            "kv_cache.layers.0='bf16': Input should be 'c8d'",
        ),
        ({"kv_cache": {"layers": ["0"]}}, "kv_cache.layers=['0']: Input should be a valid dict"),
        ({"kv_cache": {"layers": {" ": "auto"}}}, "kv_cache.layers has the pattern ' '; use an"),
        ({"kv_cache": {"precision": "int8"}}, "kv_cache.precision='int8': Input should be 'exact'"),
        ({"kv_cache": {"variant": "c8s", "scales": ""}}, "kv_cache.scales='': String should have"),
        (
            {"kv_cache": {"variant": "c8p", "patch_threshold": -0.1}},
            "kv_cache.patch_threshold=-0.1: Input should be greater than or equal to 0",
        ),
        (
            {"kv_cache": {"variant": "c8p", "patch_threshold": float("inf")}},
            "kv_cache.patch_threshold=inf: Input should be a finite number",
        ),
        (
            {"kv_cache": {"variant": "c8d", "scales": "x"}},
            "kv_cache.scales='x' is given, but no layer uses static scales. Set kv_cache.variant "
            "to 'c8s' or 'c8p', or leave kv_cache.scales out.",
        ),
        ({"kv_cache": {"scales": "x"}}, "but no layer uses static scales"),
        (
            {"kv_cache": {"variant": "c8s", "scales": "x", "patch_code": "int4"}},
            "kv_cache.patch_code='int4' is given, but no layer has patches. Set kv_cache.variant "
            "to 'c8p', or leave kv_cache.patch_code out.",
        ),
        ({"kv_cache": {"patch_threshold": 0.1}}, "kv_cache.patch_threshold=0.1 is given, but no"),
        ({"device": "gpu"}, "device='gpu': Input should be 'auto', 'cpu' or 'npu'."),
        (
            {"ops": {"implementation": "fast"}},
            "ops.implementation='fast': Input should be 'auto', 'native' or 'reference'.",
        ),
        ({"kv_cache": {"huge_pages": "yes"}}, "kv_cache.huge_pages='yes': Input should be a valid"),
        ({"kv_cache": {"huge_pages": 1}}, "kv_cache.huge_pages=1: Input should be a valid boolean"),
        ({"ops": "native"}, "ops='native': Input should be a valid dictionary"),
        ({"ops": None}, "ops=None: Input should be a valid dictionary"),
        (
            {"device": "npu", "ops": {"implementation": "native"}},
            "device='npu' and ops.implementation='native' exclude each other: the native kernels "
            "run on CPUs. Use ops.implementation='auto'.",
        ),
        ([], "--additional-config must be a JSON object, got list; for example"),
        ("cpu", "--additional-config must be a JSON object, got str"),
        (None, "--additional-config must be a JSON object, got NoneType"),
    ],
    ids=str,
)
def test_refusals(given: object, message: str) -> None:
    with pytest.raises(ConfigError) as refused:
        parse_config(given)
    assert message in str(refused.value)


def test_all_problems_are_told_at_once() -> None:
    with pytest.raises(ConfigError) as refused:
        parse_config({"device": "tpu", "ops": {"x": 1}, "kv_cache": {"huge_pages": 3}})
    for part in ("device='tpu'", "ops.x is unknown", "kv_cache.huge_pages=3"):
        assert part in str(refused.value)


def test_settings_cannot_be_changed_later() -> None:
    with pytest.raises(ValueError, match="frozen"):
        parse_config({}).device = "npu"
