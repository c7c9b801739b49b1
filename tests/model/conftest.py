"""Small GGUF files of the kind of SmolLM2's, written by the gguf library."""

from __future__ import annotations

import hashlib
import json
import os
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ascend_plugin.model.gguf_source import ModelSource
from ascend_plugin.model.smollm2 import convert_smollm2

HIDDEN, INNER, HEADS, KV_HEADS, LAYERS = 64, 96, 4, 2, 2
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
MERGES = ["h e", "l l", "he ll", "hell o", "Ġ w"]
MEMBER = "tiny_gguf/tiny.gguf"

WriteGguf = Callable[..., Path]


def vocabulary() -> list[str]:
    """Returns special tokens, the 256 byte tokens, and what the merges make."""
    from tokenizers import pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    return [*SPECIAL, *alphabet, *(merge.replace(" ", "") for merge in MERGES)]


def metadata() -> dict[str, Any]:
    """Returns the metadata of a good file; the tests spoil one value each."""
    tokens = vocabulary()
    return {
        "llama.block_count": LAYERS,
        "llama.context_length": 128,
        "llama.embedding_length": HIDDEN,
        "llama.feed_forward_length": INNER,
        "llama.attention.head_count": HEADS,
        "llama.attention.head_count_kv": KV_HEADS,
        "llama.rope.freq_base": 10000.0,
        "llama.rope.dimension_count": HIDDEN // HEADS,
        "llama.attention.layer_norm_rms_epsilon": 1e-5,
        "llama.vocab_size": len(tokens),
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "smollm",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [3] * len(SPECIAL) + [1] * (len(tokens) - len(SPECIAL)),
        "tokenizer.ggml.merges": MERGES,
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 0,
        "tokenizer.ggml.padding_token_id": 2,
        "tokenizer.chat_template": "{% for m in messages %}{{ m['content'] }}{% endfor %}",
    }


def shapes() -> dict[str, tuple[int, ...]]:
    """Returns the shapes of a good file by GGUF name."""
    kv = HIDDEN // HEADS * KV_HEADS
    layer = {
        "attn_norm": (HIDDEN,),
        "attn_q": (HIDDEN, HIDDEN),
        "attn_k": (kv, HIDDEN),
        "attn_v": (kv, HIDDEN),
        "attn_output": (HIDDEN, HIDDEN),
        "ffn_norm": (HIDDEN,),
        "ffn_gate": (INNER, HIDDEN),
        "ffn_up": (INNER, HIDDEN),
        "ffn_down": (HIDDEN, INNER),
    }
    layers = {f"blk.{i}.{k}.weight": v for i in range(LAYERS) for k, v in layer.items()}
    embedding = (len(vocabulary()), HIDDEN)
    return {"token_embd.weight": embedding, "output_norm.weight": (HIDDEN,), **layers}


def _add_metadata(writer: Any, key: str, value: Any) -> None:
    if isinstance(value, list):
        writer.add_array(key, value)
    elif isinstance(value, str):
        writer.add_string(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    else:
        writer.add_uint32(key, value)


@pytest.fixture
def write_gguf(tmp_path: Path) -> WriteGguf:
    """Writes a GGUF; metadata and tensor shapes can be changed, None drops an entry."""
    gguf = pytest.importorskip("gguf", reason="gguf, which writes the models, is not installed")

    def write(
        name: str = "tiny.gguf",
        *,
        architecture: str = "llama",
        changed: dict[str, Any] | None = None,
        tensors: dict[str, tuple[int, ...] | None] | None = None,
    ) -> Path:
        path, generator = tmp_path / name, np.random.default_rng(7)
        writer = gguf.GGUFWriter(path, architecture)
        for key, value in (metadata() | (changed or {})).items():
            if value is not None:
                _add_metadata(writer, key, value)
        for key, shape in (shapes() | (tensors or {})).items():
            if shape is None:
                continue
            values = generator.standard_normal(shape).astype(np.float32)
            if len(shape) == 1:
                writer.add_tensor(key, values)
                continue
            # The embedding in Q8_0 and the rest in Q4_1, as in SmolLM2's file.
            kind = gguf.GGMLQuantizationType["Q8_0" if key.startswith("token") else "Q4_1"]
            writer.add_tensor(key, gguf.quants.quantize(values, kind), raw_dtype=kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return path

    return write


def source_of(path: Path, **changes: Any) -> ModelSource:
    """Returns the source that pins a file, as SMOLLM2 pins the real one."""
    fields: dict[str, Any] = {
        "distribution": "tiny-gguf",
        "version": "1.0",
        "member": MEMBER,
        "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
        "license": "Apache-2.0",
        "wheel_bytes": 0,
        "gguf_bytes": 0,
        "checkpoint_bytes": 0,
    }
    return ModelSource(**(fields | changes))


@pytest.fixture
def pin() -> Callable[..., ModelSource]:
    """Pins a file: ``pin(path, **changes) -> ModelSource``."""
    return source_of


@pytest.fixture
def write_wheel(tmp_path: Path) -> Callable[[Path], Path]:
    """Packs a GGUF in a wheel, with a dependency that cannot be had."""

    def write(path: Path) -> Path:
        info = "tiny_gguf-1.0.dist-info"
        wheel = tmp_path / "index" / "tiny_gguf-1.0-py3-none-any.whl"
        wheel.parent.mkdir()
        with zipfile.ZipFile(wheel, "w", zipfile.ZIP_DEFLATED) as archive:
            archive.write(path, MEMBER)
            archive.writestr(
                f"{info}/METADATA",
                "Metadata-Version: 2.1\nName: tiny-gguf\nVersion: 1.0\n"
                "Requires-Dist: no-such-package-of-ours\n",
            )
            archive.writestr(
                f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
            )
            archive.writestr(f"{info}/RECORD", "")
        return wheel

    return write


@pytest.fixture
def read_manifest() -> Callable[[Path], dict[str, Any]]:
    """Reads the manifest of a checkpoint."""
    return lambda path: json.loads((path / "ascend_plugin_model.json").read_text())


@pytest.fixture
def tree() -> Callable[[Path], dict[str, bytes]]:
    """Reads all files below a directory, hidden ones too; empty directories as b''."""

    def read(directory: Path) -> dict[str, bytes]:
        return {
            str(path.relative_to(directory)): path.read_bytes() if path.is_file() else b""
            for path in sorted(directory.rglob("*"))
        }

    return read


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """The real checkpoint: SMOLLM2_DIR, else models/smollm2, converted if it is not there."""
    default = Path(__file__).parents[2] / "models" / "smollm2"
    return convert_smollm2(Path(os.environ.get("SMOLLM2_DIR", default))).path
