"""``bench npu-cost`` from the command line to the result."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from ascend_plugin.ops.ascendc import library

pytestmark = pytest.mark.engine

SHAPE = {
    # Norms of query and key heads: two launches more than a Llama.
    "architectures": ["Qwen3ForCausalLM"],
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 5,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 128,
}

#: At decode with graphs.
MOST_LAUNCHES = 12


#: Launches that write keys and values, and that attend, by kind of cache.
CACHES = {
    "bf16": ("kv_cache_write_none_bf16", "FusedInferAttentionScoreV3"),
    "c8d": ("kv_cache_write_c8d_bf16", "paged_attention_c8d_bf16"),
}

#: Bytes of keys and values of 64 tokens: 2 sequences, 2 heads of 128 elements.
READ = {"bf16": 2 * 2 * 64 * 2 * 128 * 2, "c8d": 2 * 2 * 64 * 2 * (128 + 4)}


@pytest.mark.skipif(bool(library.why_missing()), reason=library.why_missing() or "there")
@pytest.mark.parametrize("variant", CACHES)
def test_a_layer_takes_few_launches(tmp_path: Path, variant: str) -> None:
    (tmp_path / "config.json").write_text(json.dumps(SHAPE))
    command = [sys.executable, "-m", "ascend_plugin.cli", "bench", "npu-cost", "--json"]
    options = ["--model", str(tmp_path), "--batch", "2", "--context", "64", "--graphs", "full"]
    options += ["--variant", variant]
    finished = subprocess.run(
        [*command, *options],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=550,
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
    written, attended = CACHES[variant]
    assert operators[attended]["launches"] == 1
    assert operators[written]["launches"] == 1
    weights = 2 * (128 * (512 + 2 * 256) + 512 * 128 + 3 * 128 * 256)
    assert operators["MatmulWeightNz"]["bytes"] > weights
    assert operators[attended]["bytes"] > READ[variant]
    bounds = result["meta"]["decode"]["kernel_bounds"]
    assert set(bounds) == {name for name in (written, attended) if name.islower()}
    assert operators[written]["cycles"] > 0
