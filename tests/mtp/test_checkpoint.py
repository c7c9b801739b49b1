"""Draft layers as files, and checkpoints that join them with their base."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from ascend_plugin.config import ConfigError
from ascend_plugin.model.tiny import write_tiny_llama
from ascend_plugin.mtp.base import check_base, read_config
from ascend_plugin.mtp.checkpoint import KIND, attach, base_fingerprint, load_layer, save_layer
from ascend_plugin.mtp.errors import MTPError
from ascend_plugin.mtp.layer import PREFIX, MTPLayer
from ascend_plugin.spec_decode.token_order import FILE, VOCABULARY, TokenOrder, load_order

#: What the layer's drafts are chosen among.
ORDER = TokenOrder(torch.tensor([9, 4, 200, 3], dtype=torch.int32), 256)


@pytest.fixture
def layer(base, tmp_path):
    """A file with a layer of the base."""
    module = MTPLayer(base.shape)
    module.start_from(base)
    weights = {name: weight.bfloat16() for name, weight in module.state_dict().items()}
    path = tmp_path / "layer.safetensors"
    save_layer(path, weights, ORDER, {"base": base.fingerprint, "model": "base"})
    return path


def test_a_checkpoint_is_the_base_and_the_layer(base, base_path, layer, tmp_path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = attach(base_path, layer, tmp_path / "joined")
    joined = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    ids = torch.randint(2, 256, (1, 30))
    with torch.no_grad():
        _, normed = base.read(ids)
        torch.testing.assert_close(joined(ids).logits[0], (normed @ base.head.T)[0])
    config = read_config(folder)
    assert config["architectures"] == ["MiMoForCausalLM"]
    assert config["num_nextn_predict_layers"] == 1
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer("a page")["input_ids"] == base.tokenizer("a page")["input_ids"]
    added = load_file(folder / "mtp.safetensors")
    assert {name for name in added if name.startswith(PREFIX)} == load_layer(layer)[0].keys()
    assert (folder / "model.safetensors").samefile(base_path / "model.safetensors")
    for file in (layer, folder / FILE):
        order = load_order(file)
        assert (order.tokens.tolist(), order.vocabulary) == ([9, 4, 200, 3], 256)
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    assert FILE not in index["weight_map"].values(), "vLLM would take it for weights"


def test_a_layer_without_an_order_is_joined(base_path, layer, tmp_path) -> None:
    """Layers were written without before."""
    tensors, about = load_layer(layer)
    save_file(tensors, layer, {k: v for k, v in about.items() if k != VOCABULARY})
    assert not (attach(base_path, layer, tmp_path / "joined") / FILE).exists()


def test_an_order_of_another_vocabulary_is_refused(base, base_path, layer, tmp_path) -> None:
    weights = {n.removeprefix(PREFIX): w for n, w in load_layer(layer)[0].items()}
    save_layer(layer, weights, TokenOrder(ORDER.tokens, 300), {"base": base.fingerprint})
    with pytest.raises(ConfigError, match="orders a vocabulary of 300 tokens, and the model has 2"):
        attach(base_path, layer, tmp_path / "joined")


def test_a_checkpoint_is_replaced(base_path, layer, tmp_path) -> None:
    folder = attach(base_path, layer, tmp_path / "joined")
    (folder / "config.json").write_text("{}")
    assert read_config(attach(base_path, layer, folder))["num_nextn_predict_layers"] == 1


def test_what_is_something_else_is_kept(base_path, layer, tmp_path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes").write_text("keep")
    with pytest.raises(MTPError, match=r"mine holds something else\. Name another folder"):
        attach(base_path, layer, tmp_path / "mine")
    assert (tmp_path / "mine" / "notes").read_text() == "keep"
    with pytest.raises(MTPError, match="holds something else"):
        attach(base_path, layer, base_path)


def test_a_layer_of_another_base_is_refused(base_path, layer, tmp_path) -> None:
    other = write_tiny_llama(
        tmp_path / "other", hidden=256, heads=4, kv_heads=2, head_dim=64, seed=1
    )
    assert base_fingerprint(other) != base_fingerprint(base_path)
    with pytest.raises(MTPError, match=r"trained for another base \(base, fingerprint .*noise"):
        attach(other, layer, tmp_path / "joined")
    assert not (tmp_path / "joined").exists()


def test_a_layer_of_other_sizes_is_refused(base, base_path, layer, tmp_path) -> None:
    tensors, about = load_layer(layer)
    name = PREFIX + "mlp.up_proj.weight"
    tensors[name] = tensors[name][:5].contiguous()
    save_file(tensors, layer, about)
    with pytest.raises(MTPError, match=r"up_proj.weight is \(5, 256\), \(256, 256\) is needed"):
        attach(base_path, layer, tmp_path / "joined")
    del tensors[name]
    save_file(tensors, layer, about)
    with pytest.raises(MTPError, match=r"up_proj.weight is missing"):
        attach(base_path, layer, tmp_path / "joined")


def test_a_file_that_is_no_layer_is_refused(base_path, tmp_path) -> None:
    with pytest.raises(MTPError, match=r"is not a draft layer\. Make one with"):
        load_layer(base_path / "model.safetensors")
    with pytest.raises(MTPError, match="cannot be read as a draft layer"):
        load_layer(tmp_path / "missing")
    broken = tmp_path / "broken.safetensors"
    broken.write_bytes(b"x" * 100)
    with pytest.raises(MTPError, match="cannot be read as a draft layer"):
        load_layer(broken)
    assert KIND not in broken.read_text()


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"model_type": "gemma2"}, "is a 'gemma2' model; .* llama, mistral, qwen2"),
        ({"num_nextn_predict_layers": 1}, "has an MTP layer already"),
        ({"head_dim": 32}, "head_dim 32 is not hidden_size"),
        ({"attention_bias": True}, "attention_bias puts a bias on o_proj"),
        ({"mlp_bias": True}, "mlp_bias"),
        ({"sliding_window": 512}, "a sliding window"),
        ({"hidden_act": "gelu"}, "hidden_act 'gelu'"),
    ],
)
def test_a_base_that_does_not_fit_is_refused(base_path, tmp_path, changed, message) -> None:
    config = read_config(base_path) | changed
    with pytest.raises(MTPError, match=message):
        check_base(config, base_path)


def test_a_folder_that_is_no_model_is_refused(tmp_path, base_path) -> None:
    with pytest.raises(MTPError, match="is not a model"):
        read_config(tmp_path)
    shutil.copy(base_path / "config.json", tmp_path)
    with pytest.raises(MTPError, match="no readable safetensors"):
        base_fingerprint(tmp_path)
