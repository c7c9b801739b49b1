"""``bench npu-cost`` from the command line to the result."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.engine

SHAPE = {
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 5,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 128,
}

#: At decode with graphs.
MOST_LAUNCHES = 12


def test_a_layer_takes_few_launches(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(SHAPE))
    command = [sys.executable, "-m", "ascend_plugin.cli", "bench", "npu-cost", "--json"]
    options = ["--model", str(tmp_path), "--batch", "2", "--context", "64", "--graphs", "full"]
    finished = subprocess.run(
        [*command, *options],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert finished.returncode == 0, finished.stderr
    result = json.loads(finished.stdout)
    decode, naive = result["rows"]
    assert (decode["phase"], decode["graphs"]) == ("decode", "full")
    assert (naive["phase"], naive["graphs"]) == ("decode, naive", "none")
    if not result["meta"]["simulated"]:
        assert decode["measured_us"] > 0
        return
    assert decode["launches_per_layer"] <= MOST_LAUNCHES
    assert naive["launches_per_layer"] > 2 * decode["launches_per_layer"]
    assert decode["layers"] == 5
    assert decode["measured_us"] is None
    operators = result["meta"]["decode"]["operators_per_layer"]
    assert operators["FusedInferAttentionScoreV3"]["launches"] == 1
    assert operators["ScatterPaKvCache"]["launches"] == 1
    weights = 2 * (128 * (512 + 2 * 256) + 512 * 128 + 3 * 128 * 256)
    assert operators["MatmulWeightNz"]["bytes"] > weights
    # Keys and values of 64 tokens: 2 sequences, 2 heads of 128 elements of 2 bytes.
    assert operators["FusedInferAttentionScoreV3"]["bytes"] > 2 * 2 * 64 * 2 * 128 * 2
