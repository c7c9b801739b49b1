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
            "kv_cache": {"huge_pages": False},
        }
    )
    assert config.device == "cpu"
    assert config.ops.implementation == "reference"
    assert config.kv_cache.huge_pages is False


def test_keys_of_vllm_are_left_alone() -> None:
    assert parse_config(dict.fromkeys(VLLM_KEYS, "anything")) == PluginConfig()


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (
            {"devise": "cpu"},
            "devise is unknown (value 'cpu'); allowed here: device, kv_cache, ops.",
        ),
        (
            {"ops": {"implementatoin": "native"}},
            "ops.implementatoin is unknown (value 'native'); allowed here: implementation.",
        ),
        (
            {"kv_cache": {"huge_pages": True, "dtype": "int8"}},
            "kv_cache.dtype is unknown (value 'int8'); allowed here: huge_pages.",
        ),
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
