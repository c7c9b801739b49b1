"""Which attention backend a layer gets, and that the reason is told once."""

from __future__ import annotations

import logging

import pytest
import torch
from vllm.v1.attention.backend import AttentionType
from vllm.v1.attention.backends.registry import AttentionBackendEnum
from vllm.v1.attention.selector import AttentionSelectorConfig

from ascend_plugin.attention.cpu import AscendCPUAttentionBackend
from ascend_plugin.config import ConfigError
from ascend_plugin.platform import cpu
from ascend_plugin.platform.cpu import ATTENTION_BACKEND, MLA_BACKEND, AscendCPUPlatform

STOCK = "vllm.v1.attention.backends.cpu_attn.CPUAttentionBackend"
DECODER = AttentionSelectorConfig(
    head_size=64, dtype=torch.bfloat16, kv_cache_dtype="auto", block_size=128
)


def _choose(selected: AttentionBackendEnum | None = None, **layer: object) -> str:
    return AscendCPUPlatform.get_attn_backend_cls(selected, DECODER._replace(**layer))


@pytest.fixture
def messages(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> pytest.LogCaptureFixture:
    """What the platform logs, as if nothing had been logged before."""
    monkeypatch.setattr(cpu, "_logged", set())
    monkeypatch.setattr(logging.getLogger("ascend_plugin"), "propagate", True)
    caplog.set_level(logging.INFO, "ascend_plugin")
    return caplog


@pytest.mark.parametrize(
    "layer",
    [
        {},
        {"dtype": torch.float32},
        {"dtype": torch.float16},
        {"kv_cache_dtype": "bfloat16"},
        {"kv_cache_dtype": "float16"},
        {"kv_cache_dtype": "int8_per_token_head"},
        {"kv_cache_dtype": None},
        {"block_size": None},
        {"block_size": 16},
        {"block_size": 256},
        {"head_size": 16},
        {"head_size": 256},
        {"has_sink": True},
        {"has_sliding_window": True},
        {"use_non_causal": True},
    ],
    ids=str,
)
def test_decoders_get_the_plugin(layer: dict, messages: pytest.LogCaptureFixture) -> None:
    assert _choose(**layer) == ATTENTION_BACKEND
    assert not messages.records


@pytest.mark.parametrize(
    ("layer", "reason"),
    [
        ({"head_size": 512}, "head size 512 not supported"),
        ({"head_size": 72}, "head size 72 not supported"),
        ({"kv_cache_dtype": "fp8"}, "KV cache dtype fp8 not supported"),
        (
            {"kv_cache_dtype": "int4_per_token_head"},
            "KV cache dtype int4_per_token_head not supported",
        ),
        ({"kv_cache_dtype": "fp8_e5m2"}, "KV cache dtype fp8_e5m2 not supported"),
        ({"block_size": 8}, "block size 8 not supported"),
        ({"block_size": 512}, "block size 512 not supported"),
        ({"dtype": torch.float64}, "dtype torch.float64 not supported"),
        (
            {"attn_type": AttentionType.ENCODER_ONLY.value},
            "attention type encoder_only not supported",
        ),
        (
            {"attn_type": AttentionType.ENCODER_DECODER.value},
            "attention type encoder_decoder not supported",
        ),
    ],
    ids=str,
)
def test_other_layers_fall_to_vllm_with_a_reason(
    layer: dict, reason: str, messages: pytest.LogCaptureFixture
) -> None:
    for _ in range(3):
        assert _choose(**layer) == STOCK
    told = [record.getMessage() for record in messages.records]
    assert told == [f"Attention falls to vLLM's own CPU backend: {reason}."]


@pytest.mark.parametrize(
    ("selected", "layer", "reason"),
    [
        (None, {"head_size": 512}, "head size 512 not supported"),
        (None, {"attn_type": AttentionType.ENCODER_DECODER.value}, "attention type encoder_dec"),
        (None, {"use_mla": True, "head_size": 656}, "head size 656 not supported"),
        (AttentionBackendEnum.CPU_ATTN, {}, "--attention-backend CPU_ATTN was asked for"),
    ],
    ids=str,
)
def test_an_int8_cache_has_no_other_backend(
    selected: AttentionBackendEnum | None, layer: dict, reason: str
) -> None:
    with pytest.raises(ConfigError, match="int8_per_token_head is served by the plugin's") as told:
        _choose(selected, kv_cache_dtype="int8_per_token_head", **layer)
    assert reason in str(told.value)
    assert "Leave --kv-cache-dtype out" in str(told.value)


@pytest.mark.parametrize(
    "layer",
    [
        {},
        {"head_size": 80},
        {"dtype": torch.float32},
        {"kv_cache_dtype": "int8_per_token_head"},
        {"block_size": 16},
    ],
    ids=str,
)
def test_mla_gets_the_plugin(layer: dict, messages: pytest.LogCaptureFixture) -> None:
    assert _choose(use_mla=True, **{"head_size": 576, **layer}) == MLA_BACKEND
    assert not messages.records


@pytest.mark.parametrize(
    ("selected", "layer", "reason"),
    [
        (None, {"head_size": 656}, "head size 656 not supported"),
        (None, {"block_size": 8}, "block size 8 not supported"),
        (None, {"kv_cache_dtype": "fp8"}, "KV cache dtype fp8 not supported"),
        (AttentionBackendEnum.CPU_MLA, {}, "--attention-backend CPU_MLA was asked for"),
    ],
    ids=str,
)
def test_other_mla_falls_to_vllm(
    selected: AttentionBackendEnum | None,
    layer: dict,
    reason: str,
    messages: pytest.LogCaptureFixture,
) -> None:
    chosen = _choose(selected, use_mla=True, **{"head_size": 576, **layer})
    assert "mla" in chosen.lower()
    assert not chosen.startswith("ascend_plugin")
    (record,) = messages.records
    assert reason in record.getMessage()


def test_sparse_attention_is_refused_as_by_vllm() -> None:
    with pytest.raises(NotImplementedError, match="Sparse Attention is not supported on CPU"):
        _choose(use_sparse=True)


def test_a_chosen_backend_is_respected(messages: pytest.LogCaptureFixture) -> None:
    assert _choose(AttentionBackendEnum.CPU_ATTN) == STOCK
    (record,) = messages.records
    assert "--attention-backend CPU_ATTN was asked for" in record.getMessage()


def test_custom_names_the_plugin(messages: pytest.LogCaptureFixture) -> None:
    assert _choose(AttentionBackendEnum.CUSTOM) == ATTENTION_BACKEND
    AscendCPUPlatform.pre_register_and_update(None)
    assert AttentionBackendEnum.CUSTOM.get_class() is AscendCPUAttentionBackend
    assert _choose(AttentionBackendEnum.CUSTOM, head_size=512) == STOCK
    assert "head size 512" in messages.text


def test_the_backend_says_what_the_operators_check() -> None:
    backend = AscendCPUAttentionBackend
    assert backend.get_name() == "CUSTOM"
    assert backend.get_supported_head_sizes() == list(range(16, 257, 16))
    sizes = [size for size in range(0, 600, 8) if backend.supports_block_size(size)]
    assert sizes == list(range(16, 257, 16))
    assert backend.supported_dtypes == [torch.float32, torch.float16, torch.bfloat16]
