"""What an NPU answers to quantised weights, which it does not serve yet."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
from quant_checkpoints import QuantisedModels, set_config
from tiny_engines import TinyModels

from ascend_plugin.config import ConfigError
from ascend_plugin.platform.npu_config import _refuse_quantised_weights
from ascend_plugin.quantization.formats import describe


def test_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / "float").mkdir()
    tiny = TinyModels(tmp_path / "float")
    checkpoint = describe(Path(QuantisedModels(tmp_path, tiny)("awq").path))
    config = SimpleNamespace(quant_config=SimpleNamespace(checkpoint=checkpoint))
    with pytest.raises(ConfigError, match=r"is W4A16 of awq\), which are not served on an NPU"):
        _refuse_quantised_weights(config)
    _refuse_quantised_weights(SimpleNamespace(quant_config=None))


def test_float_weights_with_kv_scales_pass(tmp_path: Path) -> None:
    folder = Path(TinyModels(tmp_path)("llama"))
    scheme = {"type": "int", "num_bits": 8, "strategy": "tensor", "symmetric": True}
    config = {"quant_method": "compressed-tensors", "config_groups": {}, "kv_cache_scheme": scheme}
    set_config(folder, config)
    checkpoint = describe(folder)
    assert checkpoint is not None
    assert checkpoint.kv is not None
    _refuse_quantised_weights(SimpleNamespace(quant_config=SimpleNamespace(checkpoint=checkpoint)))
