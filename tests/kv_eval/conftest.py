"""Tiny models with a tokenizer, and texts that they can read."""

from __future__ import annotations

import random
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from byte_tokenizer import write_tokenizer

from ascend_plugin.kv_cache.scales import LayerScales, save_kv_scales
from ascend_plugin.model.tiny import write_tiny_llama

LAYERS, KV_HEADS, HEAD_DIM = 2, 2, 32
SHAPE = {"layers": LAYERS, "kv_heads": KV_HEADS, "head_dim": HEAD_DIM}


@pytest.fixture(scope="session")
def make_model(tmp_path_factory) -> Callable[..., Path]:
    """Write a tiny model; arguments as of ``write_tiny_llama``, ``begin`` as of the tokenizer."""

    def make(*, begin: bool = False, **arguments) -> Path:
        path = write_tiny_llama(tmp_path_factory.mktemp("model") / "tiny", **SHAPE | arguments)
        write_tokenizer(path, begin=begin)
        return path

    return make


@pytest.fixture(scope="session")
def model_path(make_model) -> Path:
    """A tiny Llama in float32."""
    return make_model(dtype="float32")


@pytest.fixture(scope="session")
def model(model_path):
    """The same, loaded."""
    from ascend_plugin.kv_eval.model import CausalModel

    return CausalModel(model_path, "auto")


@pytest.fixture(scope="session")
def text_path(tmp_path_factory) -> Path:
    """Words in random order: 6,000 bytes."""
    words = ["the", "cache", "holds", "keys", "and", "values", "of", "every", "token"]
    draw = random.Random(0)
    path = tmp_path_factory.mktemp("text") / "prose.txt"
    path.write_text(" ".join(draw.choice(words) for _ in range(2000))[:6000])
    return path


@pytest.fixture
def save_scales(tmp_path) -> Callable[..., Path]:
    """Write a scales file of ones, of the tiny model's shape unless told otherwise."""

    def save(
        layers: int = LAYERS,
        kv_heads: int = KV_HEADS,
        head_dim: int = HEAD_DIM,
        error: float | None = 0.01,
    ) -> Path:
        scale = torch.full((kv_heads, head_dim), 0.05)
        path = tmp_path / f"scales-{layers}-{kv_heads}-{head_dim}-{error}.safetensors"
        save_kv_scales(
            path, {i: LayerScales(scale, scale, error, error) for i in range(layers)}, {}
        )
        return path

    return save


@pytest.fixture
def quiet() -> Callable[[str, int, int], None]:
    """Progress that nobody looks at."""
    return lambda what, done, total: None


@pytest.fixture
def run_cli(repository) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Run ``ascend-plugin`` with arguments, in a process of its own."""

    def run(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "ascend_plugin.cli", *map(str, arguments)],
            cwd=repository,
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )

    return run
