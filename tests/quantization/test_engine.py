"""Engines on quantised checkpoints against the model that the checkpoint means."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from engines import EngineProcess, Output, assert_same
from offline_llama import FakeCache, worst_difference
from prompts import tokens
from quant_checkpoints import RECIPES, QuantisedModels, Recipe, Written, compressed_config, write
from quant_modules import Maker, compressed_packed, modelslim_static
from safetensors.torch import load_file, save_file
from tiny_engines import TinyModels, settings

pytestmark = pytest.mark.engine

PROMPTS = [tokens(length, seed=i) for i, length in enumerate((5, 40, 129))]
RUN = {"prompts": PROMPTS, "max_tokens": 8}

#: Without quantised inputs only the order of additions in float32 differs.
EXACT = 2e-3
#: A hidden state that differs in the last bit turns a few codes of inputs into their neighbours.
QUANTISED_INPUTS = 0.03

#: Checkpoints whose decode steps have operators without native kernels.
NOT_RECORDED = {
    "gptq-desc-act": "index_select",
    "compressed-transforms": "matmul",
    "modelslim-quarot": "numpy_T",
}


def check(written: Written, outputs: list[Output]) -> None:
    """Every token is the choice of the offline model with the checkpoint's meaning."""
    caches = [FakeCache()] * written.offline.layers
    fake = any(made.fake for made in written.made.values())
    tolerance = QUANTISED_INPUTS if fake else EXACT
    assert len(outputs) == len(PROMPTS)
    for prompt, output in zip(PROMPTS, outputs, strict=True):
        off = worst_difference(written.offline, caches, prompt, output)
        assert off < tolerance, f"{len(prompt)} tokens of prompt: off by {off}"


@pytest.mark.parametrize("name", RECIPES)
def test_tokens_and_logprobs(plugin: EngineProcess, quantised: QuantisedModels, name: str) -> None:
    written = quantised(name)
    answer = plugin.run(settings(written.path), RUN)
    assert answer.made_of["platform"] == "AscendCPUPlatform"
    for runs_as in RECIPES[name].runs_as:
        assert f"runs as {runs_as} with" in answer.log
    recorded, repeated, given_up = answer.steps["Decode"]
    if name in NOT_RECORDED:
        assert NOT_RECORDED[name] in given_up
    else:
        assert given_up is None
        assert recorded > 0 < repeated
    check(written, answer.outputs())


@pytest.mark.parametrize(
    "name",
    ["modelslim-w8a8", "compressed-w8a8-static-asymmetric", "compressed-w8a8-dynamic-asymmetric"],
)
def test_recorded_steps_are_those_operator_by_operator(
    plugin: EngineProcess, quantised: QuantisedModels, name: str
) -> None:
    engine = settings(quantised(name).path)
    eager = plugin.run({**engine, "enforce_eager": True}, RUN)
    assert eager.steps == {}
    assert_same(eager.outputs(), plugin.run(engine, RUN).outputs(), QUANTISED_INPUTS)


@pytest.fixture(scope="module")
def portable() -> Iterator[EngineProcess]:
    """The plugin with kernels that know no instructions of the processor."""
    process = EngineProcess({"ASCEND_PLUGIN_CPU_ISA": "portable"})
    yield process
    process.stop()


@pytest.mark.parametrize(
    "name",
    [
        "modelslim-w8a8",
        "compressed-w8a8-static-asymmetric",
        "compressed-w8a8-dynamic",
        "compressed-w8a8-dynamic-asymmetric",
    ],
)
def test_int8_where_onednn_is_faster(
    portable: EngineProcess, quantised: QuantisedModels, name: str
) -> None:
    written = quantised(name)
    answer = portable.run(settings(written.path), RUN)
    given_up = answer.steps["Decode"][2]
    if name == "modelslim-w8a8":  # its integers fit the plugin's product alone
        assert "with static_quant, quant_matmul" in answer.log
        assert given_up is None
    else:
        assert "with vLLM's oneDNN int8" in answer.log
        assert "onednn_scaled_int8_quant" in given_up or "int8" in given_up
    check(written, answer.outputs())


@pytest.mark.parametrize("name", ["compressed-w4a16-group", "gptq-desc-act", "awq"])
def test_same_tokens_as_the_float_model(
    plugin: EngineProcess, quantised: QuantisedModels, name: str
) -> None:
    """The dequantised weights in an engine of their own give the same text."""
    written = quantised(name)
    want = plugin.run(settings(written.float_path), RUN).outputs()
    got = plugin.run(settings(written.path), RUN).outputs()
    assert [output.tokens for output in got] == [output.tokens for output in want]


@pytest.mark.parametrize("name", ["modelslim-mixed", "compressed-w4a16-group", "gptq-desc-act"])
def test_bfloat16(plugin: EngineProcess, quantised: QuantisedModels, name: str) -> None:
    """In bfloat16 the quantised model stays as close to its meaning as the float one does."""
    written = quantised(name)
    caches = [FakeCache()] * written.offline.layers
    off = []
    for path in (written.path, written.float_path):
        outputs = plugin.run(settings(path, dtype="bfloat16"), RUN).outputs()
        pairs = zip(PROMPTS, outputs, strict=True)
        off.append([worst_difference(written.offline, caches, *pair) for pair in pairs])
    assert max(off[0]) < max(0.15, 1.5 * max(off[1])), off


@pytest.mark.parametrize("name", ["modelslim-w8a8", "compressed-w8a8-dynamic", "gptq", "awq"])
def test_named_by_flag(plugin: EngineProcess, quantised: QuantisedModels, name: str) -> None:
    written = quantised(name)
    answer = plugin.run(settings(written.path, quantization="ascend"), RUN)
    check(written, answer.outputs())


@pytest.mark.slow
@pytest.mark.parametrize("name", ["modelslim-mixed", "gptq-desc-act", "compressed-transforms"])
def test_compiled(plugin: EngineProcess, quantised: QuantisedModels, name: str) -> None:
    written = quantised(name)
    answer = plugin.run(settings(written.path, compilation_config={"mode": 3}), RUN)
    check(written, answer.outputs())


@pytest.fixture(scope="module")
def parallel():
    """Engines of two workers, each with its own processor."""
    process = EngineProcess({"VLLM_CPU_OMP_THREADS_BIND": "0|1"})
    yield process
    process.stop()


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    ["modelslim-w8a8", "modelslim-mixed", "compressed-w4a16-group-asymmetric", "awq"],
)
def test_tensor_parallel(parallel: EngineProcess, quantised: QuantisedModels, name: str) -> None:
    """Rows, and columns by whole groups, of two processes make the model."""
    written = quantised(name)
    answer = parallel.run(settings(written.path, tensor_parallel_size=2), RUN)
    assert answer.made_of == {"executor": "MultiprocExecutor"}
    caches = [FakeCache()] * written.offline.layers
    for prompt, output in zip(PROMPTS, answer.outputs(), strict=True):
        # Inputs of rows that are split are quantised per process.
        off = worst_difference(written.offline, caches, prompt, output)
        assert off < (0.5 if "w8a8" in name or "mixed" in name else EXACT), off


@pytest.mark.slow
def test_groups_that_processes_cannot_share(
    parallel: EngineProcess, quantised: QuantisedModels
) -> None:
    with pytest.raises(RuntimeError) as caught:
        parallel.run(settings(quantised("gptq-desc-act").path, tensor_parallel_size=2), RUN)
    assert "expected desc_act=false" in str(caught.value)


def _static_qkv(module: str) -> Maker | None:
    """Quantise what has a bias; loud values of V would saturate the others' static scales."""
    return modelslim_static() if module.endswith(("q_proj", "k_proj", "v_proj")) else None


def test_biases(plugin: EngineProcess, tiny: TinyModels, tmp_path: Path) -> None:
    """ModelSlim's quant_bias holds the bias, which must not be added a second time."""
    model = tiny("qwen2", architecture="qwen2", heads=2, kv_heads=1)
    loud = tmp_path / "loud"
    shutil.copytree(model, loud)
    weights = load_file(loud / "model.safetensors")
    weights = {name: w * 20 if name.endswith(".bias") else w for name, w in weights.items()}
    save_file(weights, loud / "model.safetensors", {"format": "pt"})
    written = [
        write(Recipe(_static_qkv, None, ()), str(loud), tmp_path / "modelslim"),
        write(
            Recipe(lambda _: compressed_packed(4, 32, True), compressed_config(4, 32), ()),
            str(loud),
            tmp_path / "compressed",
        ),
    ]
    for each, tolerance in zip(written, (0.5, EXACT), strict=True):
        want = plugin.run(settings(each.float_path), RUN).outputs()
        got = plugin.run(settings(each.path), RUN).outputs()
        off = max(abs(a.logprobs[0] - b.logprobs[0]) for a, b in zip(want, got, strict=True))
        assert off < tolerance, off


def test_kv_scales_of_a_quantised_checkpoint(
    plugin: EngineProcess, quantised: QuantisedModels, tmp_path: Path
) -> None:
    """An int8 KV scheme beside int8 weights gives c8s pages without any flag."""
    folder = tmp_path / "model"
    shutil.copytree(quantised("compressed-w8a8-dynamic").path, folder)
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"]["kv_cache_scheme"] = {
        "num_bits": 8,
        "type": "int",
        "strategy": "tensor",
        "symmetric": True,
        "dynamic": False,
    }
    (folder / "config.json").write_text(json.dumps(config))
    tensors = load_file(folder / "model.safetensors")
    for i in range(2):
        for side, scale in (("k", 0.06), ("v", 0.04)):
            tensors[f"model.layers.{i}.self_attn.{side}_scale"] = torch.tensor([scale])
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    answer = plugin.run(settings(str(folder)), RUN)
    assert answer.made_of["dtypes"] == ["torch.int8"]
    assert list(answer.counters) == ["c8s"]
    assert "KV cache: C8 scales of 2 layers" in answer.log
    assert "runs as W8A8_DYNAMIC" in answer.log


def test_refused_before_serving(
    plugin: EngineProcess, quantised: QuantisedModels, tmp_path: Path
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(quantised("modelslim-w8a8").path, folder)
    path = folder / "quant_model_description.json"
    description = json.loads(path.read_text())
    name = "model.layers.0.self_attn.q_proj.weight"
    description[name] = "W1A1"
    path.write_text(json.dumps(description))
    with pytest.raises(RuntimeError, match=f"the type of tensor {name} is 'W1A1'; allowed here"):
        plugin.run(settings(str(folder)), RUN)


def test_files_of_another_model(
    plugin: EngineProcess, quantised: QuantisedModels, tmp_path: Path
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(quantised("gptq").path, folder)
    config = json.loads((folder / "config.json").read_text())
    config["intermediate_size"] = 512
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(RuntimeError, match=r"down_proj 256 input features, expected 512 \(config"):
        plugin.run(settings(str(folder)), RUN)
