"""Pairs of calls: order, layers and ratio."""

from __future__ import annotations

import pytest
import torch

from ascend_plugin.bench.attention.contenders import plain_reader
from ascend_plugin.bench.timing import PairedTimes, Prepared, time_pairs, time_turns


def _recorder(name: str, calls: list[tuple[str, int]]) -> Prepared:
    return Prepared(run=lambda layer: calls.append((name, layer)), layers=3, result=torch.empty(0))


def test_the_order_alternates_and_layers_go_round():
    calls: list[tuple[str, int]] = []
    times = time_pairs(_recorder("ours", calls), _recorder("stock", calls), seconds=0.0)
    measured = calls[2:]  # the first call of each is not measured
    assert measured[:6] == [
        ("stock", 0),
        ("ours", 0),
        ("ours", 1),
        ("stock", 1),
        ("stock", 2),
        ("ours", 2),
    ]
    assert len(times.ours) == len(times.stock) == len(measured) / 2


def test_many_contenders_change_order_and_go_round_their_own_layers():
    calls: list[tuple[str, int]] = []

    def recorder(name: str, layers: int) -> Prepared:
        return Prepared(lambda layer: calls.append((name, layer)), layers, torch.empty(0))

    layers = {"a": 1, "b": 2, "c": 3}
    times = time_turns({name: recorder(name, count) for name, count in layers.items()}, 0.0)
    measured = calls[3:]
    assert [name for name, _ in measured[:6]] == ["c", "b", "a", "a", "b", "c"]
    for name, count in layers.items():
        assert [layer for other, layer in measured if other == name] == [
            i % count for i in range(5)
        ]
    assert {len(each) for each in times.values()} == {5}


def test_a_plain_read_leaves_the_measured_layer_alone(monkeypatch):
    caches = tuple(torch.zeros(1, 1, 16, 4) for _ in range(4))
    ours = Prepared(run=lambda layer: None, layers=4, result=torch.empty(0), caches=caches)
    read: list[int] = []
    monkeypatch.setattr(torch.Tensor, "max", lambda words: read.append(words.data_ptr()))
    plain_reader(ours).run(1)
    assert read == [caches[3].data_ptr()]


def test_one_contender_alone():
    calls: list[tuple[str, int]] = []
    times = time_pairs(_recorder("ours", calls), None, seconds=0.0)
    assert (times.stock_median, times.ratio) == (None, None)
    assert times.median > 0


def test_the_ratio_is_the_median_of_pairs():
    # One disturbed pair, slow on both sides, leaves the ratio alone.
    times = PairedTimes(ours=(1.0, 50.0, 1.0), stock=(2.0, 60.0, 2.0))
    assert times.ratio == pytest.approx(2.0)
    assert (times.median, times.stock_median) == (1.0, 2.0)
