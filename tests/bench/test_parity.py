"""The float64 oracle: it accepts every implementation's result and nothing that is wrong."""

from __future__ import annotations

import pytest
import torch

from ascend_plugin.bench.attention import parity
from ascend_plugin.bench.attention.cases import INT8_VARIANTS, VARIANTS, Case, Geometry
from ascend_plugin.bench.attention.contenders import PluginContender
from ascend_plugin.bench.attention.data import make_data, unquantised
from ascend_plugin.bench.timing import Prepared
from ascend_plugin.ops.nz import from_nz, page_planes

GEOMETRY = Geometry(heads=4, kv_heads=2, head_dim=32, block_size=16)


def _case(phase: str, variant: str) -> Case:
    new = {"decode": 1, "prefill": 50, "write": 1}[phase]
    return Case(phase, variant, 3, 70, new, GEOMETRY)


def _dense_attention(data) -> torch.Tensor:
    """Attention from the unpaged inputs, by torch's own operator in float64."""
    case = data.case
    shape = (case.batch, case.context, GEOMETRY.kv_heads, GEOMETRY.head_dim)
    key, value = (x.double().view(shape).transpose(1, 2) for x in (data.key, data.value))
    query = data.query.double().unflatten(0, (case.batch, -1)).transpose(1, 2)
    rows = torch.arange(case.context - case.new_tokens, case.context)
    mask = torch.arange(case.context)[None, :] <= rows[:, None]
    out = torch.nn.functional.scaled_dot_product_attention(
        query, key, value, attn_mask=mask, enable_gqa=True
    )
    return out.transpose(1, 2).flatten(0, 1)


@pytest.mark.parametrize("phase", ["decode", "prefill"])
def test_the_oracle_is_attention_over_the_unpaged_inputs(phase):
    data = make_data(_case(phase, "bf16"))
    oracle = parity.attention_oracle(data)
    assert oracle.rows.tolist() == list(range(data.query.shape[0]))
    torch.testing.assert_close(oracle.expected, _dense_attention(data), rtol=1e-12, atol=1e-12)


def test_chunks_change_nothing(monkeypatch):
    data = make_data(_case("prefill", "bf16"))
    whole = parity.attention_oracle(data)
    monkeypatch.setattr(parity, "_MAX_SCORES", 7 * GEOMETRY.heads * data.case.context)
    chunked = parity.attention_oracle(data)
    assert torch.equal(chunked.rows, whole.rows)
    torch.testing.assert_close(chunked.expected, whole.expected, rtol=1e-12, atol=1e-12)


def test_a_large_case_is_sampled_with_both_ends(monkeypatch):
    data = make_data(_case("prefill", "bf16"))
    whole = parity.attention_oracle(data)
    monkeypatch.setattr(parity, "_MAX_SCORES", 7 * GEOMETRY.heads * data.case.context)
    monkeypatch.setattr(parity, "_MAX_FLOP", data.case.flop / 4)
    sampled = parity.attention_oracle(data)
    assert 0 < len(sampled.rows) < len(whole.rows)
    assert (int(sampled.rows[0]), int(sampled.rows[-1])) == (0, len(whole.rows) - 1)
    torch.testing.assert_close(sampled.expected, whole.expected[sampled.rows])


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("phase", ["decode", "prefill"])
def test_every_implementation_passes(implementation, phase, variant):
    data = make_data(_case(phase, variant))
    prepared = PluginContender().prepare(data)
    found = parity.check_attention(prepared, parity.attention_oracle(data))
    assert found.ok, found


@pytest.mark.parametrize("variant", VARIANTS)
def test_one_wrong_vector_is_found(variant):
    oracle = parity.attention_oracle(make_data(_case("prefill", variant)))
    good = oracle.expected.clone()
    assert oracle.compare(good).ok
    good[-1, 2] *= 1.5
    assert not oracle.compare(good).ok


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_a_result_that_is_not_finite_is_wrong(poison):
    oracle = parity.attention_oracle(make_data(_case("decode", "fp32")))
    result = oracle.expected.clone()
    result[0, 0, 0] = poison
    assert oracle.compare(result) == parity.Parity(False, None)


def test_an_operator_that_writes_nothing_is_wrong():
    data = make_data(_case("decode", "bf16"))
    idle = Prepared(run=lambda layer: None, layers=1, result=torch.zeros(data.query.shape))
    assert not parity.check_attention(idle, parity.attention_oracle(data)).ok


@pytest.mark.parametrize("variant", INT8_VARIANTS)
def test_int8_pages_hold_the_keys_and_values_within_the_quantisation(variant):
    data = make_data(_case("decode", variant))
    truth = parity.attention_oracle(unquantised(data))
    found = parity.attention_oracle(data)
    error = float((found.expected - truth.expected).norm() / truth.expected.norm())
    assert 1e-3 < error < 5e-2


def test_written_pages_equal_the_tokens_they_hold():
    data = make_data(_case("write", "bf16"))
    key, value = page_planes(data.pages, data.page.layout())
    for plane, tokens in ((key, data.key), (value, data.value)):
        rows = from_nz(plane).transpose(1, 2).flatten(0, 1)  # [slots, kv_heads, head_dim]
        assert torch.equal(rows[data.slot_mapping], tokens)


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_write_passes_and_one_wrong_byte_does_not(implementation, variant):
    data = make_data(_case("write", variant))
    prepared = PluginContender().prepare(data)
    assert parity.check_write(prepared, data) == parity.Parity(True, 0.0)
    prepared.caches[-1].view(torch.uint8).flatten()[5] ^= 1
    assert not parity.compare_pages(prepared, data).ok
