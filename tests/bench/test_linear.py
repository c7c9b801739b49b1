"""The float64 oracle of linear layers: it accepts every implementation, and nothing wrong."""

from __future__ import annotations

import math

import pytest
import torch
from vllm.platforms import current_platform

from ascend_plugin.bench.linear import contenders, data
from ascend_plugin.bench.linear.cases import MODEL_SHAPES, SCHEMES, LinearCase, make_cases
from ascend_plugin.bench.linear.stock import StockContender
from ascend_plugin.bench.parity import Parity


@pytest.fixture(autouse=True)
def _few_layers(monkeypatch):
    monkeypatch.setattr(LinearCase, "layers", 2)


def _case(scheme: str, m: int = 5) -> LinearCase:
    return LinearCase(scheme, m, 96, 128, 128 if scheme in ("w8a8", "bf16") else 32)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_every_implementation_passes(implementation, scheme):
    tensors = data.make_data(_case(scheme))
    prepared = contenders.plugin(tensors)
    for layer in range(2):
        prepared.run(layer)
        found = data.oracle(tensors).compare(prepared.last())
        assert found.ok, found


@pytest.mark.parametrize(
    "scheme", [scheme for scheme in SCHEMES if scheme not in ("w8a16", "bf16")]
)
def test_vllm_computes_the_same(scheme):
    assert current_platform.is_cpu()  # decided before stock operators are loaded without plugins
    stock = StockContender()
    case = _case(scheme)
    assert stock.refusal(case) is None
    tensors = data.make_data(case)
    for prepared in (stock.prepare(tensors), stock.bf16(tensors), contenders.bf16(tensors)):
        prepared.run(1)
        error = data.oracle(tensors).compare(prepared.last()).rel_l2
        assert error is not None
        assert error < 2e-2  # bfloat16 weights, or activations in 8 bits


@pytest.mark.parametrize("scheme", SCHEMES)
def test_one_wrong_row_is_found(scheme):
    oracle = data.oracle(data.make_data(_case(scheme, 60)))
    result = torch.zeros(60, 96, dtype=torch.float64)
    result[oracle.rows] = oracle.expected
    assert oracle.compare(result).ok
    result[oracle.rows[-1]] *= 1.03
    assert not oracle.compare(result).ok


def test_a_result_that_is_not_finite_is_wrong():
    oracle = data.oracle(data.make_data(_case("w4a16")))
    result = oracle.expected.clone()
    result[0, 0] = math.nan
    assert oracle.compare(result) == Parity(False, None)


def test_shapes_of_models():
    cases = make_cases((), ("smollm2", "64x96"), (1,), 32)
    assert [(case.n, case.k) for case in cases] == [*MODEL_SHAPES["smollm2"], (64, 96)]
    assert {case.group for case in cases} == {32}
    assert make_cases(("w8a8",), ("64x96",), (1,), 32)[0].group == 96
