"""Tiny quantised checkpoints, and engines that serve them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from engines import EngineProcess
from quant_checkpoints import QuantisedModels
from tiny_engines import TinyModels


@pytest.fixture(scope="session")
def plugin() -> Iterator[EngineProcess]:
    """Vllm with the plugin."""
    process = EngineProcess({})
    yield process
    process.stop()


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> TinyModels:
    """Write tiny float models by name."""
    return TinyModels(tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="session")
def quantised(tiny: TinyModels, tmp_path_factory: pytest.TempPathFactory) -> QuantisedModels:
    """Write tiny quantised checkpoints by name."""
    return QuantisedModels(tmp_path_factory.mktemp("quantised"), tiny)


@pytest.fixture
def folder(quantised: QuantisedModels, tmp_path: Path) -> Path:
    """A folder to break a checkpoint in."""
    return tmp_path / "checkpoint"
