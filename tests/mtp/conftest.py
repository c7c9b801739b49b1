"""A tiny base model, what it writes, and readings of that."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from byte_tokenizer import write_tokenizer

from ascend_plugin.model.tiny import write_tiny_llama
from ascend_plugin.mtp.base import BaseModel
from ascend_plugin.mtp.hidden import HiddenCache, Reading
from ascend_plugin.mtp.sampling import Sample

TEMPLATE = (
    "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def write_base(path: Path, **more) -> Path:
    """Write a tiny Llama whose head dimension fits MiMo's layout, with a tokenizer for chats."""
    write_tiny_llama(path, hidden=256, heads=4, kv_heads=2, head_dim=64, **more)
    write_tokenizer(path)
    (path / "chat_template.jinja").write_text(TEMPLATE)
    return path


@pytest.fixture(scope="session")
def base_path(tmp_path_factory) -> Path:
    return write_base(tmp_path_factory.mktemp("mtp") / "base")


@pytest.fixture(scope="session")
def base(base_path) -> BaseModel:
    return BaseModel(base_path)


@pytest.fixture(scope="session")
def samples(base) -> list[Sample]:
    """Greedy answers; the first four are held out."""
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(2, 256, (28, 6), generator=generator)
    prompts = ids.tolist()
    with torch.no_grad():
        for _ in range(34):
            _, normed = base.read(ids)
            ids = torch.cat([ids, (normed[:, -1:] @ base.head.T).argmax(-1)], 1)
    completions = ids[:, 6:].tolist()
    return [
        Sample("prose", i < 4, prompt, completion)
        for i, (prompt, completion) in enumerate(zip(prompts, completions, strict=True))
    ]


@pytest.fixture(scope="session")
def readings(base, samples, tmp_path_factory) -> list[Reading]:
    cache = HiddenCache(tmp_path_factory.mktemp("hidden"), "all")
    cache.fill(base, samples, lambda *_: None)
    return cache.load()
