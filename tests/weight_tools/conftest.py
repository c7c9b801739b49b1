"""Tiny models and quantised checkpoints, as the other rooms' tests have them."""

from __future__ import annotations

from pathlib import Path

import pytest
from quant_checkpoints import QuantisedModels
from tiny_engines import TinyModels


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> TinyModels:
    """Write tiny float models by name."""
    return TinyModels(tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="session")
def quantised(tiny: TinyModels, tmp_path_factory: pytest.TempPathFactory) -> QuantisedModels:
    """Write tiny quantised checkpoints by name."""
    return QuantisedModels(tmp_path_factory.mktemp("quantised"), tiny)


@pytest.fixture(scope="session")
def text_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Words in a fixed order: about 9,000 bytes."""
    path = tmp_path_factory.mktemp("text") / "prose.txt"
    words = ["the", "weights", "of", "every", "layer", "are", "held", "in", "few", "bits"]
    path.write_text(" ".join(words[i * i % len(words)] for i in range(1800)))
    return path
