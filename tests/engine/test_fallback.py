"""Layers that pages do not serve run on vLLM's own backend, and the log says so once."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from engines import EngineProcess, assert_same
from prompts import tokens
from tiny_engines import TinyModels, settings

pytestmark = pytest.mark.engine

RUN = {"prompts": [tokens(n, seed=n) for n in (5, 60, 200)], "max_tokens": 12}
TOLD = "Attention falls to vLLM's own CPU backend: "


def test_a_head_size_beyond_pages(
    plugin: EngineProcess, stock: EngineProcess, tiny: TinyModels
) -> None:
    model = tiny("wide heads", heads=2, kv_heads=1, head_dim=512, layers=3)
    answer = plugin.run(settings(model), RUN)
    assert answer.made_of["backends"] == ["CPUAttentionBackend"]
    assert answer.log.count(TOLD + "head size 512 not supported.") == 1
    assert_same(stock.run(settings(model), RUN).outputs(), answer.outputs())


def test_the_stock_backend_on_request(
    plugin: EngineProcess, stock: EngineProcess, tiny: TinyModels
) -> None:
    model = tiny("llama")
    chosen = {"attention_config": {"backend": "CPU_ATTN"}}
    answer = plugin.run(settings(model, **chosen), RUN)
    assert answer.made_of["platform"] == "AscendCPUPlatform"
    assert answer.made_of["backends"] == ["CPUAttentionBackend"]
    assert answer.log.count(TOLD + "--attention-backend CPU_ATTN was asked for.") == 1
    assert_same(stock.run(settings(model), RUN).outputs(), answer.outputs())


def test_the_plugin_on_request(plugin: EngineProcess, tiny: TinyModels) -> None:
    chosen = {"attention_config": {"backend": "CUSTOM"}}
    answer = plugin.run(settings(tiny("llama"), **chosen), RUN)
    assert answer.made_of["backends"] == ["AscendCPUAttentionBackend"]
    assert TOLD not in answer.log


def test_an_encoder(plugin: EngineProcess, stock: EngineProcess, tmp_path: Path) -> None:
    engine = {
        "model": _write_encoder(tmp_path),
        "runner": "pooling",
        "dtype": "float32",
        "enforce_eager": True,
        "max_model_len": 512,
        "kv_cache_memory_bytes": 1 << 26,
    }
    run = {"prompts": [tokens(5), tokens(90)], "embed": True}
    answer = plugin.run(engine, run)
    assert answer.log.count(TOLD) == 1
    want = stock.run(engine, run).runs[0]["embeddings"]
    torch.testing.assert_close(
        torch.tensor(answer.runs[0]["embeddings"]), torch.tensor(want), atol=1e-5, rtol=1e-5
    )


def _write_encoder(path: Path) -> str:
    """Write a tiny random BERT, and the tokenizer that vLLM's pooling wants to see."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

    torch.manual_seed(0)
    shape = {"hidden_size": 64, "num_attention_heads": 2, "num_hidden_layers": 2}
    BertModel(BertConfig(vocab_size=256, intermediate_size=128, **shape)).save_pretrained(path)
    words = Tokenizer(WordLevel({f"w{i}": i for i in range(256)}, unk_token="w0"))
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="w0").save_pretrained(path)
    return str(path)
