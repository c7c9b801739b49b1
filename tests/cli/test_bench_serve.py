"""``bench serve`` with a tiny model, and what it refuses."""

from __future__ import annotations

import json

import pytest

from ascend_plugin.model.tiny import write_tiny_llama

ROW_KEYS = {
    "model",
    "variant",
    "batch",
    "context",
    "new_tokens",
    "rounds",
    "threads",
    "decode_tok_s",
    "stock_decode_tok_s",
    "ratio_vs_stock",
    "peer_decode_tok_s",
    "ratio_vs_peer",
    "ttft_ms",
    "stock_ttft_ms",
    "ttft_ratio_vs_stock",
    "peer_ttft_ms",
    "tokens_equal_prefix",
    "tokens_compared",
    "note",
}


@pytest.mark.engine
@pytest.mark.slow
def test_two_engines_in_turn(run_cli, tmp_path):
    model, theirs = (
        write_tiny_llama(tmp_path / name, dtype="float32", head_dim=32)
        for name in ("tiny", "theirs")
    )
    done = run_cli(
        *("bench", "serve", "--model", model, "--variant", "fp32", "--batch", "2"),
        *("--stock-model", theirs, "--eager"),
        *("--context", "40", "--context", "150", "--new-tokens", "3", "--rounds", "2"),
        *("--threads", "1", "--json"),
    )
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert [row["context"] for row in result["rows"]] == [40, 150]
    for row in result["rows"]:
        assert set(row) == ROW_KEYS
        # In float32 both engines must choose the same tokens: the first one and every round's.
        assert row["tokens_compared"] >= 2 * (1 + 2 * 3)
        assert row["tokens_equal_prefix"] == row["tokens_compared"]
        assert row["decode_tok_s"] > 0
        assert row["stock_decode_tok_s"] > 0
    engines = result["meta"]["engines"][str(model)]
    assert engines["ascend-plugin"]["platform"].startswith("ascend_plugin.platform.")
    assert engines["vllm"]["platform"] == "vllm.platforms.cpu.CpuPlatform"
    assert engines["vllm"]["threads"] == engines["ascend-plugin"]["threads"] == 1
    assert engines["vllm"]["execution"] == engines["ascend-plugin"]["execution"] == "eager"
    stored = (model / "model.safetensors").stat().st_size
    assert engines["ascend-plugin"]["checkpoint_bytes"] == pytest.approx(stored, rel=0.05)
    assert engines["ascend-plugin"]["resident_bytes"] > 0 < engines["ascend-plugin"]["load_seconds"]
    assert engines["vllm"]["resident_bytes"] is engines["vllm"]["load_seconds"] is None
    assert result["meta"]["execution"] == "eager"
    checkpoints = result["meta"]["checkpoints"][str(model)]
    assert checkpoints == {"ascend-plugin": str(model), "vllm": str(theirs), "llama.cpp": None}


@pytest.mark.engine
@pytest.mark.slow
def test_an_int8_cache_alone_in_several_batches(run_cli, tmp_path):
    model = write_tiny_llama(tmp_path / "tiny", head_dim=32)
    done = run_cli(
        *("bench", "serve", "--model", model, "--variant", "c8d-fast", "--no-stock"),
        *("--batch", "1", "--batch", "2", "--context", "40", "--new-tokens", "2"),
        *("--rounds", "1", "--threads", "1", "--json"),
    )
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert [row["batch"] for row in result["rows"]] == [1, 2]
    for row in result["rows"]:
        assert row["variant"] == "c8d-fast"
        assert row["decode_tok_s"] > 0
        assert row["stock_decode_tok_s"] is row["ratio_vs_stock"] is row["note"] is None
    assert result["meta"]["kv_cache"] == {"variant": "c8d", "precision": "fast"}
    assert result["meta"]["execution"] == "default"
    assert list(result["meta"]["engines"][str(model)]) == ["ascend-plugin"]
    assert result["meta"]["engines"][str(model)]["ascend-plugin"]["execution"] == "recorded steps"


@pytest.mark.engine
@pytest.mark.slow
def test_an_engine_that_does_not_start_shows_its_last_lines(run_cli, tmp_path):
    model = write_tiny_llama(tmp_path / "tiny")
    (model / "model.safetensors").unlink()
    done = run_cli("bench", "serve", "--model", model, "--context", "16", "--threads", "1")
    assert done.returncode == 1
    assert "Error: the engine of" in done.stderr
    assert "Cannot find any model weights" in done.stderr
    assert 'Traceback (most recent call last):\n  File "<frozen' not in done.stderr


@pytest.mark.parametrize(
    "arguments, words",
    [
        (("--model", "no-model"), ("--model no-model", "config.json", "qwen3-28x1024")),
        (("--variant", "int4"), ("--variant int4", "bf16, fp16, fp32")),
        (("--variant", "c8s"), ("--variant c8s", "--scales FILE", "calibrate kv")),
        (("--variant", "c8d", "--scales", "x"), ("--scales x", "--variant c8d", "c8p")),
        (("--batch", "0"), ("--batch 0", "1 to")),
        (("--rounds", "0"), ("--rounds 0",)),
        (("--threads", "100000"), ("--threads 100000",)),
        (("--context", "0"), ("--context 0", "at least 1")),
        (("--model", "smollm2", "--weights", "w4a16"), ("--weights w4a16", "qwen3-28x1024")),
        (("--model", "m", "--peer", "llama.cpp"), ("--peer llama.cpp", "--gguf FILE")),
        (
            ("--model", "qwen3-28x1024", "--context", "50000"),
            ("--context 50000", "40960 positions", "Lower --context"),
        ),
    ],
)
def test_refusals_say_what_is_allowed(run_cli, arguments, words):
    done = run_cli("bench", "serve", *arguments)
    assert done.returncode == 1
    assert done.stdout == ""
    assert "Error: " in done.stderr
    for word in words:
        assert word in done.stderr
