"""What is refused of quantised weights when an engine is configured, before a worker exists."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from quant_checkpoints import QuantisedModels, set_config
from tiny_engines import TinyModels

from ascend_plugin.quantization import adopt
from ascend_plugin.quantization.config import AscendQuantizationConfig
from ascend_plugin.quantization.errors import CheckpointError


@pytest.fixture(scope="module")
def quantised(tmp_path_factory: pytest.TempPathFactory) -> QuantisedModels:
    folder = tmp_path_factory.mktemp("quantised")
    (folder / "float").mkdir()
    return QuantisedModels(folder, TinyModels(folder / "float"))


def _engine(folder: str) -> Any:
    config = json.loads((Path(folder) / "config.json").read_text())
    found = AscendQuantizationConfig(config.get("quantization_config"))
    found.maybe_update_config(folder)
    model = SimpleNamespace(model=folder, quantization="ascend")
    return SimpleNamespace(model_config=model, quant_config=found)


@pytest.mark.parametrize("name", ["awq", "modelslim-mixed", "gptq-desc-act"])
def test_dense_models_are_served_on_an_npu(quantised: QuantisedModels, name: str) -> None:
    adopt(_engine(quantised(name).path), "npu")


def test_experts_that_only_a_cpu_serves(quantised: QuantisedModels) -> None:
    engine = _engine(quantised("gptq-desc-act", "qwen3_moe").path)
    adopt(engine, "cpu")
    with pytest.raises(CheckpointError) as caught:
        adopt(engine, "npu")
    message = str(caught.value)
    assert "experts.0.down_proj (W4A16 of gptq) is not served on an NPU: groups in" in message
    assert "inspect --device npu; set ASCEND_PLUGIN_DEVICE=cpu" in message


def test_float_weights_with_kv_scales_pass(tmp_path: Path) -> None:
    folder = Path(TinyModels(tmp_path)("llama"))
    scheme = {"type": "int", "num_bits": 8, "strategy": "tensor", "symmetric": True}
    config = {"quant_method": "compressed-tensors", "config_groups": {}, "kv_cache_scheme": scheme}
    set_config(folder, config)
    engine = _engine(str(folder))
    assert engine.quant_config.checkpoint.kv is not None
    adopt(engine, "npu")
