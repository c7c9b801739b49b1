"""Latent attention (MLA) that an NPU does not serve: said at start, with value and remedy."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from vllm.v1.attention.selector import AttentionSelectorConfig

from ascend_plugin.config import ConfigError

DEEPSEEK = AttentionSelectorConfig(
    head_size=576, dtype=torch.bfloat16, kv_cache_dtype="auto", block_size=128, use_mla=True
)


def _configured(heads: int = 16, connector: str | None = None, **sizes: Any) -> None:
    from ascend_plugin.platform.npu_config import _refuse_latents

    text = {"kv_lora_rank": 512, "qk_rope_head_dim": 64, **sizes}
    model = SimpleNamespace(
        hf_text_config=SimpleNamespace(**text), get_num_attention_heads=lambda parallel: heads
    )
    engine: Any = SimpleNamespace(
        model_config=model, parallel_config=None, kv_transfer_config=connector
    )
    _refuse_latents(engine)


def test_sizes_of_deepseek_are_served() -> None:
    for heads in (1, 2, 16, 128):
        _configured(heads)


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"kv_lora_rank": 256}, r"kv_lora_rank 256 with qk_rope_head_dim 64; .* reads 512 with 64"),
        ({"qk_rope_head_dim": 32}, r"kv_lora_rank 512 with qk_rope_head_dim 32; .* 512 with 64"),
        ({"kv_lora_rank": None}, r"kv_lora_rank 0 with"),
        ({"heads": 40}, r"40 query heads .* up to 128: change --tensor-parallel-size"),
        ({"heads": 256}, r"256 query heads on a device"),
        ({"index_topk": 2048}, r"attention to chosen tokens \(sparse MLA\)"),
        ({"connector": "X"}, r"a KV connector, .* \(leave --kv-transfer-config out\)"),
    ],
    ids=str,
)
def test_what_no_operator_serves_is_refused(options: dict[str, Any], told: str) -> None:
    with pytest.raises(ConfigError, match=told) as error:
        _configured(**options)
    assert "Set ASCEND_PLUGIN_DEVICE=cpu to serve on the CPU." in str(error.value)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("cache", ["auto", "bfloat16", "int8_per_token_head"])
def test_layers_get_the_plugins_backend(dtype: torch.dtype, cache: str) -> None:
    from ascend_plugin.platform.npu import MLA_BACKEND, AscendNPUPlatform

    layer = DEEPSEEK._replace(dtype=dtype, kv_cache_dtype=cache)
    assert AscendNPUPlatform.get_attn_backend_cls(None, layer) == MLA_BACKEND


@pytest.mark.parametrize(
    ("layer", "told"),
    [
        ({"head_size": 320}, "head size 320 not supported"),
        ({"block_size": 8}, "block size 8 not supported"),
        ({"kv_cache_dtype": "fp8"}, "KV cache dtype fp8 not supported"),
        ({"dtype": torch.float32}, "dtype torch.float32 not supported"),
        ({"use_sparse": True}, "sparse not supported"),
    ],
    ids=str,
)
def test_other_layers_are_refused(layer: dict[str, Any], told: str) -> None:
    from ascend_plugin.platform.npu import AscendNPUPlatform

    with pytest.raises(ConfigError, match=told) as error:
        AscendNPUPlatform.get_attn_backend_cls(None, DEEPSEEK._replace(**layer))
    assert "latents of 512 with rotary parts of 64" in str(error.value)


def _layer(**changes: Any) -> Any:
    from ascend_plugin.attention.mla_npu import AscendNPUMLAImpl

    shared = {"num_heads": 4, "head_size": 576, "scale": 1.0, "num_kv_heads": 1}
    unused = ("alibi_slopes", "sliding_window", "logits_soft_cap", "kv_sharing_target_layer_name")
    latents = {"kv_lora_rank": 512, "qk_rope_head_dim": 64, "kv_b_proj": None}
    known = {**shared, **dict.fromkeys(unused), "kv_cache_dtype": "auto", "attn_type": "decoder"}
    return AscendNPUMLAImpl(**{**known, **latents, **changes})


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"num_heads": 12}, r"12 query heads on a device"),
        ({"kv_lora_rank": 128}, r"kv_lora_rank 128 with qk_rope_head_dim 64"),
        ({"sliding_window": 64}, r"sliding_window 64 is not served over NZ pages"),
        ({"alibi_slopes": [1.0]}, r"alibi_slopes \[1\.0\] is not served"),
    ],
    ids=str,
)
def test_layers_say_what_they_do_not_compute(changes: dict[str, Any], told: str) -> None:
    with pytest.raises(ValueError, match=told) as error:
        _layer(**changes)
    assert "Set ASCEND_PLUGIN_DEVICE=cpu to serve on the CPU." in str(error.value)


def test_prefill_that_is_sent_elsewhere_is_seen() -> None:
    from ascend_plugin.attention.mla_npu import AbsorbedPrefill

    sizes = {"qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128}
    prefill: Any = AbsorbedPrefill(
        num_heads=4, scale=1.0, kv_lora_rank=512, vllm_config=None, **sizes
    )
    with pytest.raises(RuntimeError, match="takes the absorbed path"):
        prefill.run_prefill_context_chunk(None, None, None, None)
