"""Calibration: the right numbers, the same after an interruption, and what it refuses."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file, save_file

from ascend_plugin.kv_cache.scales import load_kv_scales
from ascend_plugin.kv_eval import KVEvalError
from ascend_plugin.kv_eval.calibrate import Statistics, calibrate, calibrate_into, describe
from ascend_plugin.kv_eval.geometry import Geometry
from ascend_plugin.kv_eval.routing import LayerCall
from ascend_plugin.kv_eval.state import StateFile
from ascend_plugin.kv_eval.text import cut_windows, read_texts


@pytest.fixture
def windows(model, text_path):
    return cut_windows(read_texts([text_path]), model.tokenizer, context=160, tokens=480)


@pytest.fixture
def state(model, windows, tmp_path):
    return StateFile(tmp_path / "scales.safetensors", describe(model, windows, "text"))


def call(key: torch.Tensor, value: torch.Tensor) -> LayerCall:
    return LayerCall(0, key, key, value, 1.0)


def test_scales_are_the_largest_values_and_errors_follow(model, windows, state, quiet):
    seen = {i: [] for i in model.layers}

    def look(layer_call):
        seen[layer_call.layer].append((layer_call.key.clone(), layer_call.value.clone()))
        return torch.nn.functional.scaled_dot_product_attention(
            *(x.transpose(0, 1) for x in (layer_call.query, layer_call.key, layer_call.value)),
            is_causal=True,
            scale=layer_call.scale,
            enable_gqa=True,
        ).transpose(0, 1)

    for window in windows.ids:
        model.logits(window[:-1], look)
    layers, rows = calibrate(model, windows, state, quiet)
    for i, row in enumerate(rows):
        found = (layers[i].k_scale, layers[i].v_scale), (layers[i].k_error, layers[i].v_error)
        for j, (scale, error) in enumerate(zip(*found, strict=True)):
            x = torch.cat([pair[j] for pair in seen[i]])
            torch.testing.assert_close(scale, x.abs().amax(0) / 127, rtol=1e-4, atol=0)
            off = (x - (x / scale).round().clamp(-127, 127) * scale).norm(dim=-1)
            assert error == pytest.approx(float((off / x.norm(dim=-1)).mean()), rel=1e-3)
        assert (row.layer, row.kv_heads, row.head_dim) == (i, 2, 32)
        assert row.k_absmax == pytest.approx(float(layers[i].k_scale.max()) * 127)


def test_an_interrupted_run_ends_in_the_same_file(model, windows, state, quiet, tmp_path):
    whole, _ = calibrate(model, windows, StateFile(tmp_path / "whole", {}), quiet)

    class Interruption(KeyboardInterrupt):
        pass

    told: list[int] = []

    def report(what, done, total):
        assert total == 6
        told.append(done)
        if done == stops[-1]:
            raise Interruption

    stops = []
    for stop in (1, 2, 4, 5):  # in the first pass, and in the second
        stops.append(stop)
        with pytest.raises(Interruption):
            calibrate(model, windows, state, report)
        assert state.path.is_file()
    told.clear()
    stops.append(None)
    resumed, _ = calibrate(model, windows, state, report)
    assert told == [5, 6]
    for i, layer in whole.items():
        assert torch.equal(layer.k_scale, resumed[i].k_scale)
        assert torch.equal(layer.v_scale, resumed[i].v_scale)
        assert (layer.k_error, layer.v_error) == (resumed[i].k_error, resumed[i].v_error)


def test_an_interrupted_window_leaves_no_trace(model, windows, state, quiet, monkeypatch):
    whole, _ = calibrate(model, windows, state, quiet)
    state.remove()
    calls = []
    see = Statistics.see_errors

    def stop_in_the_middle(self, layer_call, scales):
        see(self, layer_call, scales)
        calls.append(layer_call.layer)
        if len(calls) == 3:  # layer 0 of the second window has been added
            raise KeyboardInterrupt

    monkeypatch.setattr(Statistics, "see_errors", stop_in_the_middle)
    with pytest.raises(KeyboardInterrupt):
        calibrate(model, windows, state, quiet)
    monkeypatch.undo()
    resumed, _ = calibrate(model, windows, state, quiet)
    assert resumed[0].k_error == whole[0].k_error


def test_the_file_says_where_it_comes_from(model, windows, state, quiet, tmp_path):
    output = tmp_path / "scales.safetensors"
    about = describe(model, windows, "text")
    calibrate_into(output, model, windows, about, state, quiet)
    layers, metadata = load_kv_scales(output)
    assert sorted(layers) == [0, 1]
    assert about.items() <= metadata.items()
    assert (metadata["model"], metadata["tokens"], metadata["dtype"]) == ("tiny", "480", "float32")
    assert not state.path.exists()
    assert [path.name for path in tmp_path.iterdir()] == ["scales.safetensors"]


def test_a_state_of_something_else_is_refused(model, windows, state, quiet, tmp_path):
    state.save(Statistics(model.layers).tensors())
    other = describe(model, windows, "other text") | {"model_digest": "0"}
    with pytest.raises(KVEvalError, match=r"differs in model_digest, text_sha256.*--restart"):
        calibrate(model, windows, StateFile(tmp_path / "scales.safetensors", other), quiet)


def test_a_damaged_state_is_refused(model, windows, state, quiet):
    state.path.write_bytes(b"no safetensors")
    with pytest.raises(KVEvalError, match=r"cannot be read.*--restart"):
        calibrate(model, windows, state, quiet)
    save_file({"done": torch.tensor([1])}, state.path)
    assert "done" in load_file(state.path)
    with pytest.raises(KVEvalError, match="differs in"):
        calibrate(model, windows, state, quiet)


def test_outputs_that_cannot_be(tmp_path):
    with pytest.raises(KVEvalError, match="there is no folder"):
        StateFile(tmp_path / "none" / "x", {})
    with pytest.raises(KVEvalError, match="is a folder"):
        StateFile(tmp_path, {})


def test_values_that_are_not_finite_are_refused():
    statistics = Statistics({0: Geometry(1, 1, 16)})
    key = torch.ones(4, 1, 16)
    key[2, 0, 3] = torch.inf
    with pytest.raises(KVEvalError, match=r"layer 0.*not finite"):
        statistics.see_values(call(key, torch.ones(4, 1, 16)))


def test_silent_channels_and_heads_get_usable_scales():
    statistics = Statistics({0: Geometry(2, 2, 16)})
    key = torch.ones(4, 2, 16)
    key[:, 0, 5] = 0.0
    value = torch.ones(4, 2, 16)
    value[:, 1] = 0.0
    statistics.see_values(call(key, value))
    scales = statistics.scales(0)
    assert scales[0, 0, 5] == pytest.approx(1e-4 / 127)
    assert scales[1, 1].tolist() == pytest.approx([1 / 127] * 16)
    statistics.see_errors(call(key, value), scales)
    assert statistics.errors[0][1].tolist() == [0.0, 4.0]  # rows of zeros have no relative error
