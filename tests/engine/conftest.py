"""Engines, models and prompts that the engine tests share."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from engines import STOCK, EngineProcess
from int8_engines import Int8Models
from tiny_engines import TinyModels


@pytest.fixture(scope="session")
def stock() -> Iterator[EngineProcess]:
    """Vllm without the plugin."""
    process = EngineProcess(STOCK)
    yield process
    process.stop()


@pytest.fixture(scope="session")
def plugin() -> Iterator[EngineProcess]:
    """Vllm with the plugin."""
    process = EngineProcess({})
    yield process
    process.stop()


@pytest.fixture(scope="session")
def smollm2(repository: Path) -> str:
    """The real small model."""
    path = repository / "models" / "smollm2"
    if not (path / "model.safetensors").is_file():
        pytest.skip("models/smollm2 is missing: ascend-plugin model smollm2 models/smollm2")
    return str(path)


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> TinyModels:
    """Write tiny models by name."""
    return TinyModels(tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="session")
def int8(tiny: TinyModels, tmp_path_factory: pytest.TempPathFactory) -> Int8Models:
    """Write tiny models and their KV scales by name."""
    return Int8Models(tiny, tmp_path_factory.mktemp("scales"))
