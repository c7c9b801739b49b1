"""Who runs in ``bench serve``, llama.cpp's process, and rows with and without other contenders."""

from __future__ import annotations

import importlib.util
import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from ascend_plugin.bench.decoder_config import decoder_config
from ascend_plugin.bench.errors import BenchError
from ascend_plugin.bench.serve import contest, driver, messages
from ascend_plugin.bench.serve.drawn_weights import write_w4a16
from ascend_plugin.bench.serve.rows import Measured, make_row
from ascend_plugin.bench.serve.settings import Settings
from ascend_plugin.quantization import formats

_BINDINGS = Path(__file__).parents[1] / "support" / "llama_cpp_bindings"

_SETTINGS = Settings(
    batches=(1, 2), contexts=(16,), new_tokens=10, rounds=3, threads=1, variant="bf16"
)


def _model(folder: Path, vocabulary: int = 64) -> str:
    folder.mkdir()
    config = decoder_config(
        "qwen3",
        layers=2,
        hidden=64,
        intermediate=128,
        heads=2,
        kv_heads=1,
        head_dim=64,
        vocabulary=vocabulary,
        positions=512,
    )
    (folder / "config.json").write_text(json.dumps(config))
    return str(folder)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (
            {"models": ("a", "b"), "stock_model": "c"},
            ("--stock-model is compared with one", "a, b"),
        ),
        ({"stock_model": "c", "stock": False}, ("--stock-model", "--no-stock")),
        ({"peer": "llama.cpp"}, ("--peer llama.cpp needs --gguf FILE",)),
        ({"gguf": Path("x.gguf")}, ("--gguf x.gguf is for --peer llama.cpp",)),
        ({"gguf": Path("x.gguf"), "peer": "llama.cpp"}, ("--gguf x.gguf is not a file",)),
        ({"models": (), "peer": "llama.cpp"}, ("--peer is compared with one --model", "are 0")),
    ],
)
def test_entrants_that_do_not_go_together(options, words):
    with pytest.raises(BenchError) as error:
        contest.Entrants(**({"models": ("m",)} | options))
    for word in words:
        assert word in str(error.value)


def test_a_missing_llama_cpp_comes_with_its_command(monkeypatch, tmp_path):
    (tmp_path / "m.gguf").write_bytes(b"GGUF")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(BenchError, match=r"Run: pip install llama-cpp-python"):
        contest.Entrants(("m",), peer="llama.cpp", gguf=tmp_path / "m.gguf")


def test_stock_serves_another_checkpoint_of_the_same_tokens(tmp_path):
    ours, theirs = _model(tmp_path / "ours"), _model(tmp_path / "theirs")
    (made,) = contest.make_contests(contest.Entrants((ours,), stock_model=theirs), tmp_path)
    assert [spec.name for spec in made.specs] == ["ascend-plugin", "vllm"]
    assert not made.same_weights
    assert made.checkpoints() == {"ascend-plugin": ours, "vllm": theirs, "llama.cpp": None}
    (same,) = contest.make_contests(contest.Entrants((ours,)), tmp_path)
    assert same.same_weights
    (alone,) = contest.make_contests(contest.Entrants((ours,), stock=False), tmp_path)
    assert [spec.name for spec in alone.specs] == ["ascend-plugin"]
    other = _model(tmp_path / "other", vocabulary=65)
    with pytest.raises(BenchError, match=r"65 token ids and --model .* has 64"):
        contest.make_contests(contest.Entrants((ours,), stock_model=other), tmp_path)


def test_memory_counts_every_contender(tmp_path, monkeypatch):
    ours = _model(tmp_path / "ours")
    gguf = tmp_path / "m.gguf"
    gguf.write_bytes(b"GGUF")
    alone = contest.Contest(contest.resolve_model(ours, tmp_path), None)
    monkeypatch.setattr(contest.machine, "available_memory", lambda: int(2.5 * 2**30))
    contest.require_fit(alone, _SETTINGS)
    with pytest.raises(BenchError, match=r"2 engines of .* need about 3\.0 GiB .* 2\.5 GiB are"):
        contest.require_fit(contest.Contest(alone.ours, None, gguf), _SETTINGS)


def test_drawn_weights_are_a_w4a16_checkpoint(tmp_path):
    config = json.loads((Path(_model(tmp_path / "float")) / "config.json").read_text())
    write_w4a16(tmp_path / "drawn", config)
    checkpoint = formats.describe(tmp_path / "drawn")
    modules = {name: about for name, about in checkpoint.modules.items() if "embed" not in name}
    quantised = {n: about for n, about in modules.items() if about.scheme.name == "W4A16"}
    assert len(quantised) == 2 * 7
    assert {about.group for about in quantised.values()} == {64}
    tensors = load_file(tmp_path / "drawn" / "model.safetensors")
    assert tensors["model.layers.1.self_attn.q_norm.weight"].dtype == torch.bfloat16
    codes = tensors["model.layers.0.mlp.down_proj.weight_packed"]
    assert codes.shape == (64, 128 // 8)
    # All codes occur in every place of an int32.
    for shift in range(0, 32, 4):
        assert len(((codes >> shift) & 15).unique()) == 16
    write_w4a16(tmp_path / "again", config)
    again = load_file(tmp_path / "again" / "model.safetensors")
    assert all(torch.equal(tensors[name], again[name]) for name in tensors)


def _row(measured: dict[str, Measured], same_weights: bool = True):
    return make_row("m", 2, 16, _SETTINGS, measured, same_weights)


def test_rows_with_and_without_others():
    ours = Measured([0.1, 0.2], [1.0, 2.0, 4.0], [[1, 2], [3, 4]])
    stock = Measured([0.3, 0.6], [2.0, 6.0, 4.0], [[1, 2], [3, 5]])
    peer = Measured([1.0, 2.0], [5.0, 4.0, 4.0], [[9, 9], [9, 9]])
    alone = _row({"ascend-plugin": ours})
    assert alone.decode_tok_s == 2 * 10 / 2.0
    assert alone.ttft_ms == 150.0
    absent = ("stock_decode_tok_s", "ratio_vs_stock", "peer_decode_tok_s", "ratio_vs_peer")
    for name in (*absent, "stock_ttft_ms", "peer_ttft_ms", "tokens_compared", "note"):
        assert getattr(alone, name) is None
    row = _row({"ascend-plugin": ours, "vllm": stock, "llama.cpp": peer})
    assert (row.stock_decode_tok_s, row.ratio_vs_stock) == (5.0, 2.0)  # of 2, 3, 1
    assert (row.peer_decode_tok_s, row.ratio_vs_peer) == (5.0, 2.0)  # of 5, 2, 1
    assert (row.stock_ttft_ms, row.ttft_ratio_vs_stock, row.peer_ttft_ms) == (450.0, 3.0, 1500.0)
    assert (row.tokens_equal_prefix, row.tokens_compared, row.note) == (3, 4, None)


def test_notes_of_a_row():
    ours = Measured([0.1], [1.0], [[1, 2, 3]], "steps were not recorded: no reason")
    stock = Measured([0.1], [1.0], [[9, 2, 3]])
    both = {"ascend-plugin": ours, "vllm": stock}
    assert _row(both).note == (
        "steps were not recorded: no reason; greedy tokens part early: check parity with bench "
        "attention"
    )
    # Other weights say other things.
    assert _row(both, same_weights=False).note == "steps were not recorded: no reason"


@pytest.fixture
def bindings(monkeypatch):
    """The stand-in of llama-cpp-python, here and in processes that start."""
    known = os.environ.get("PYTHONPATH")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, [str(_BINDINGS), known])))
    spec = importlib.util.spec_from_file_location("_bindings", _BINDINGS / "llama_cpp.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def llama_cpp(bindings, tmp_path):
    worker = driver.WorkerProcess(driver.LLAMA_CPP, 1, tmp_path / "log")
    yield worker
    worker.close()


def _gguf(path: Path, content: bytes = b"GGUF", vocabulary: int = 97) -> messages.LoadGguf:
    path.write_bytes(content)
    return messages.LoadGguf(str(path), vocabulary, 1, 200, 2, 7)


def test_llama_cpp_decodes_all_sequences_together(llama_cpp, bindings, tmp_path):
    loaded = llama_cpp.ask(_gguf(tmp_path / "m.gguf"), messages.Loaded)
    assert loaded.platform == "llama_cpp 0.0.0"
    assert (loaded.threads, loaded.execution) == (1, "llama_decode")
    for _ in range(2):  # a case leaves nothing to the next one
        prompts = [list(range(2, 19)), [5, 4, 3]]  # longer and shorter than a call's 7 tokens
        first = llama_cpp.ask(messages.Prefill(prompts, 99), messages.Prefilled).first_token_s
        assert first == sorted(first)
        for _ in range(2):
            assert llama_cpp.ask(messages.Decode(3), messages.Decoded).seconds > 0
        tokens = llama_cpp.ask(messages.Finish(), messages.Finished).tokens
        for prompt, output in zip(prompts, tokens, strict=True):
            expected = list(prompt)
            for _ in range(7):
                expected.append(bindings.next_token(expected))
            assert output == expected[len(prompt) :]


@pytest.mark.parametrize(
    ("content", "vocabulary", "words"),
    [
        (b"none", 97, "cannot load .*: choose another --gguf"),
        (b"GGUF", 98, "has 97 token ids and the prompts are drawn from 98"),
    ],
)
def test_llama_cpp_refuses_a_file(llama_cpp, tmp_path, content, vocabulary, words):
    with pytest.raises(BenchError, match=words):
        llama_cpp.ask(_gguf(tmp_path / "m.gguf", content, vocabulary), messages.Loaded)
