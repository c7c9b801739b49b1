"""The record of launches."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import ascend_plugin.ops.sim.operators  # noqa: F401  fills the table
from ascend_plugin.ops.sim.arguments import FractalTensor
from ascend_plugin.ops.sim.table import OPERATORS
from ascend_plugin.ops.sim.trace import Trace, describe, size, traffic


def test_lines(tmp_path: Path) -> None:
    path = tmp_path / "trace.jsonl"
    trace = Trace(str(path))
    x, scale = torch.zeros(3, 4), torch.zeros(1).expand(5)
    trace.launch(OPERATORS["aclnnMul"], [x, scale, x], stream=2, replay=7)
    trace.launch(OPERATORS["aclnnCat"], [[x, x.int()], 0, x], stream=0, replay=0)
    first, second = (json.loads(line) for line in path.read_text().splitlines())
    assert first["operator"] == "aclnnMul"
    assert first["tensors"] == [
        [[3, 4], "float32", "ND"],
        [[5], "float32", "ND"],
        [[3, 4], "float32", "ND"],
    ]
    assert (first["stream"], first["replay"]) == (2, 7)
    assert first["bytes"] == 48 + 4 + 48  # a broadcast operand is read once
    assert [each[1] for each in second["tensors"]] == ["float32", "int32", "float32"]


def test_launches_of_graphs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from ascend_plugin.ops.sim.bind import TABLE

    x = torch.ones(4, device="npu")
    graph = torch.npu.NPUGraph()
    with torch.npu.graph(graph):
        x.mul_(2)
    torch.npu.synchronize()
    path = tmp_path / "trace.jsonl"
    monkeypatch.setattr(TABLE, "_trace", Trace(str(path)))
    x.add_(1)
    graph.replay()
    graph.replay()
    torch.npu.synchronize()
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [(line["operator"], line["replay"]) for line in lines] == [
        ("aclnnInplaceAdds", 0),
        ("aclnnInplaceMuls", 1),
        ("aclnnInplaceMuls", 2),
    ]
    assert {line["bytes"] for line in lines} == {16}


def test_bytes_of_a_gather_are_those_of_its_rows() -> None:
    table, index = torch.zeros(1000, 8), torch.zeros(3, dtype=torch.int64)
    out = torch.zeros(3, 8)
    assert traffic(OPERATORS["aclnnEmbedding"], [table, index, out]) == 2 * out.nbytes + 24


def test_bytes_of_attention_are_those_of_its_tokens() -> None:
    from ascend_plugin.ops.sim.operators.attention_call import _NAMES

    pages = torch.zeros(100, 2, 4, 16, 16, dtype=torch.bfloat16)
    query = torch.zeros(2, 4, 64, dtype=torch.bfloat16)
    given = {
        "query": query,
        "keys": [pages],
        "values": [pages.clone()],  # one tensor for both would be latents, which are read once
        "actual_seq_lengths": [1, 2],
        "actual_seq_lengths_kv": [20, 5],
        "block_table": torch.zeros(2, 2, dtype=torch.int32),
        "input_layout": b"TND",
        "num_heads": 4,
        "num_key_value_heads": 2,
        "key_antiquant_mode": 0,
        "value_antiquant_mode": 0,
        "softmax_lse_flag": False,
        "attention_out": query,
        "softmax_lse": torch.zeros(1),
    }
    args = [given.get(name) for name in _NAMES[3]]
    moved = traffic(OPERATORS["aclnnFusedInferAttentionScoreV3"], args)
    assert moved == 2 * query.nbytes + 25 * 2 * 2 * 64 * 2 + 16


def test_private_formats() -> None:
    cubes = torch.zeros(4, 3, 16, 16, dtype=torch.bfloat16)
    tensor = FractalTensor(cubes, torch.Size((40, 64)), torch.bfloat16, False)
    assert describe(tensor) == ([40, 64], "bfloat16", "NZ")
    assert size(tensor) == cubes.nbytes
