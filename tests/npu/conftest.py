"""Device tests: on hardware (``make test-npu``), or on the simulator, unchanged.

``ascend-plugin sim run -- python -m pytest tests/npu``
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from engines import EngineProcess
from npu_engines import CPU, NPUModels
from quant_checkpoints import QuantisedModels


@pytest.fixture(scope="session")
def device() -> torch.device:
    """The first NPU, with the plugin's operators registered for it."""
    from ascend_plugin.ops.npu import library

    library.register()

    return torch.device("npu:0")


@pytest.fixture(scope="session")
def npu() -> Iterator[EngineProcess]:
    """Vllm with the plugin, on the NPU."""
    process = EngineProcess({"VLLM_LOGGING_LEVEL": "INFO"})
    yield process
    process.stop()


@pytest.fixture(scope="session")
def cpu() -> Iterator[EngineProcess]:
    """Vllm with the plugin, on this machine's CPU: what answers are compared with."""
    process = EngineProcess(CPU)
    yield process
    process.stop()


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> NPUModels:
    """Write tiny models by name."""
    return NPUModels(tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="session")
def quantised(models: NPUModels, tmp_path_factory: pytest.TempPathFactory) -> QuantisedModels:
    """Write tiny quantised checkpoints by name, of bfloat16 models."""
    return QuantisedModels(tmp_path_factory.mktemp("quantised"), models)


@pytest.fixture(scope="session")
def smollm2(repository: Path) -> str:
    """The real small model."""
    path = repository / "models" / "smollm2"
    if not (path / "model.safetensors").is_file():
        pytest.skip("models/smollm2 is missing: ascend-plugin model smollm2 models/smollm2")
    return str(path)
