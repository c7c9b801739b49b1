"""``bench npu-cost`` from the command line to the result."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from ascend_plugin.bench.npu_cost import kernel
from ascend_plugin.bench.npu_cost.messages import KernelShape
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


@pytest.fixture(scope="module")
def result(tmp_path_factory: pytest.TempPathFactory) -> dict:
    """Count both kinds of cache in one run, and attention's kernel over a range of shapes."""
    if library.why_missing():
        pytest.skip(library.why_missing())
    folder = tmp_path_factory.mktemp("model")
    (folder / "config.json").write_text(json.dumps(SHAPE))
    command = [sys.executable, "-m", "ascend_plugin.cli", "bench", "npu-cost", "--json"]
    options = ["--model", str(folder), "--batch", "2", "--context", "64", "--graphs", "full"]
    options += [part for variant in CACHES for part in ("--variant", variant)]
    finished = subprocess.run(
        [*command, *options, "--sweep", "--drafts", "7"],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=550,
        check=False,
    )
    assert finished.returncode == 0, finished.stderr
    told: dict = json.loads(finished.stdout)
    return told


def rows_of(result: dict, variant: str) -> tuple[dict, dict]:
    decode, naive = (row for row in result["rows"] if row["variant"] == variant)
    assert (decode["phase"], decode["graphs"]) == ("decode", "full")
    assert (naive["phase"], naive["graphs"]) == ("decode, naive", "none")
    return decode, naive


@pytest.mark.parametrize("variant", CACHES)
def test_a_layer_takes_few_launches(result: dict, variant: str) -> None:
    decode, naive = rows_of(result, variant)
    if not result["meta"]["simulated"]:
        assert decode["measured_us"] > 0
        return
    assert decode["launches_per_layer"] <= MOST_LAUNCHES
    assert naive["launches_per_layer"] > 2 * decode["launches_per_layer"]
    assert decode["layers"] == 5
    assert decode["measured_us"] is None
    told = result["meta"]["variants"][variant]["decode"]
    operators = told["operators_per_layer"]
    written, attended = CACHES[variant]
    assert operators[attended]["launches"] == 1
    assert operators[written]["launches"] == 1
    weights = 2 * (128 * (512 + 2 * 256) + 512 * 128 + 3 * 128 * 256)
    assert operators["MatmulWeightNz"]["bytes"] > weights
    assert operators[attended]["bytes"] > READ[variant]
    assert set(told["kernel_bounds"]) == {name for name in (written, attended) if name.islower()}
    assert operators[written]["cycles"] > 0


def test_what_the_kernel_of_attention_does_is_told_beside_the_layer(result: dict) -> None:
    if not result["meta"]["simulated"]:
        assert all(row["measured_us"] > 0 for row in result["kernels"])
        return
    assert rows_of(result, "bf16")[0]["kernel_us"] is None
    decode, _ = rows_of(result, "c8d")
    first = result["kernels"][0]
    assert (first["batch"], first["context"], first["query_tokens"]) == (2, 64, 1)
    assert first["pages_bytes"] == READ["c8d"]
    told = (decode["kernel_us"], decode["kernel_bound"], decode["pages_read_ratio"])
    assert told == (first["estimated_us"], first["bound"], first["pages_read_ratio"])
    operators = result["meta"]["variants"]["c8d"]["decode"]["operators_per_layer"]
    assert operators["paged_attention_c8d_bf16"]["bytes"] == first["bytes"]


def test_pages_are_read_once_at_every_shape(result: dict) -> None:
    if not result["meta"]["simulated"]:
        pytest.skip("bytes are counted on the simulated NPU")
    assert {row["query_tokens"] for row in result["kernels"]} == {1, 8}
    for row in result["kernels"]:
        assert row["pages_read_ratio"] == pytest.approx(1, abs=0.05), row
        assert row["cycles"] >= row["busiest_cycles"] >= row["memory_cycles"] > 0


def test_the_bound_depends_on_the_shape(result: dict) -> None:
    if not result["meta"]["simulated"]:
        pytest.skip("the estimate is the host model's")
    bounds = {
        (row["batch"], row["context"], row["query_tokens"]): (row["bound"], row["busiest"])
        for row in result["kernels"]
    }
    assert bounds[8, 16384, 1] == ("memory", "HBM")
    assert bounds[1, 256, 8][0] != "memory"


def test_a_kernel_is_timed_by_events_as_on_hardware() -> None:
    """What the simulator's clock says means nothing; that torch_npu takes the calls does."""
    if library.why_missing():
        pytest.skip(library.why_missing())
    shape = KernelShape("c8d", 4, 2, 128, 128, batch=1, context=256, query_tokens=1)
    told = kernel.launch(shape, trace="")
    assert told.pages_bytes == 2 * 256 * 2 * (128 + 4)
    assert told.us is not None
    assert told.us >= 0
