"""What the worker of llm-compressor does around the tool, which this environment does not have."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from ascend_plugin.weight_tools.workers.llm_compressor import forget_fused

FUSED = {"apply": [{"location": "weight_output"}, {"location": "weight_input"}]}
ONLINE = {"apply": [{"location": "input"}, {"location": "weight_input"}]}
GROUPS = {"group_0": {"targets": ["Linear"]}}


@pytest.mark.parametrize(
    ("quantisation", "stays"),
    [
        ({"transform_config": {"config_groups": {"R1": FUSED, "R2": FUSED}}}, False),
        ({"transform_config": {"config_groups": {"R1": FUSED, "R4": ONLINE}}}, True),
        ({"transform_config": {"config_groups": {"R1": FUSED}}, "config_groups": GROUPS}, True),
        ({"transform_config": {}, "config_groups": GROUPS}, True),
        (None, True),
    ],
)
def test_rotations_that_weights_hold_are_no_quantisation(
    tmp_path: Path, quantisation: dict[str, Any] | None, stays: bool
) -> None:
    """The configuration goes if nothing is left to be done, and only then."""
    config: dict[str, Any] = {"hidden_size": 64}
    if quantisation is not None:
        config["quantization_config"] = {"quant_method": "compressed-tensors", **quantisation}
    path = tmp_path / "config.json"
    path.write_text(json.dumps(config))
    forget_fused(tmp_path)
    expected = config if stays else {"hidden_size": 64}
    assert json.loads(path.read_text()) == expected
