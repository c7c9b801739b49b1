"""Models of transformers whose attention is ours."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from byte_tokenizer import write_tokenizer

from ascend_plugin.kv_eval import KVEvalError
from ascend_plugin.kv_eval.model import CausalModel, Geometry, model_digest
from ascend_plugin.kv_eval.pages import PagedSequence
from ascend_plugin.kv_eval.variants import EXACT

IDS = torch.arange(60, 60 + 200) % 256


def paged(call_pages: PagedSequence):
    def attend(call):
        call_pages.write(call.key, call.value)
        return call_pages.attend(call.query, call)

    return attend


def theirs(path: Path, ids: torch.Tensor) -> torch.Tensor:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(path, dtype="auto", attn_implementation="eager")
    with torch.no_grad():
        return model(input_ids=ids[None], use_cache=False).logits[0].float()


@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"architecture": "mistral", "sliding_window": 48},
        {"architecture": "qwen3"},
        {"architecture": "gemma2", "sliding_window": 48, "attn_softcap": 20.0},
    ],
    ids=lambda a: a.get("architecture", "llama"),
)
def test_our_pages_give_transformers_own_logits(make_model, arguments):
    path = make_model(dtype="float32", **arguments)
    ours = CausalModel(path, "auto").logits(IDS, paged(PagedSequence(EXACT, len(IDS))))
    torch.testing.assert_close(ours, theirs(path, IDS), rtol=1e-3, atol=1e-3)


def test_what_is_known_of_a_model(model, model_path):
    assert model.name == "tiny"
    assert model.layers == {i: Geometry(heads=4, kv_heads=2, head_dim=32) for i in range(2)}
    assert model.dtype == torch.float32
    assert model.digest == model_digest(model_path)


def test_the_last_projection_is_float32_even_if_tied(make_model):
    path = make_model(architecture="gemma2", dtype="bfloat16")
    model = CausalModel(path, "auto")
    assert model.dtype == torch.bfloat16
    logits = model.logits(IDS, paged(PagedSequence(EXACT, len(IDS))))
    assert not torch.equal(logits, logits.bfloat16().float())


def test_another_dtype_on_demand(model_path):
    assert CausalModel(model_path, "bfloat16").dtype == torch.bfloat16
    with pytest.raises(KVEvalError, match=r"--dtype int8.*auto, bfloat16"):
        CausalModel(model_path, "int8")


def test_the_digest_sees_weights(make_model, model_path):
    assert model_digest(make_model(dtype="float32", seed=1)) != model_digest(model_path)
    assert model_digest(make_model(dtype="float32")) == model_digest(model_path)


@pytest.mark.parametrize("context, words", [(1, "2 to 4096"), (4097, "2 to 4096")])
def test_contexts(model, context, words):
    model.check_context(4096)
    with pytest.raises(KVEvalError, match=rf"--context {context}.*{words}"):
        model.check_context(context)


def test_a_folder_without_a_model(tmp_path):
    with pytest.raises(KVEvalError, match=r"no config\.json"):
        CausalModel(tmp_path, "auto")
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(KVEvalError, match="cannot be loaded"):
        CausalModel(tmp_path, "auto")


def test_a_model_without_weights(make_model):
    path = make_model(dtype="float32")
    (path / "model.safetensors").unlink()
    with pytest.raises(KVEvalError, match="cannot be loaded"):
        CausalModel(path, "auto")


def test_a_head_dimension_that_pages_cannot_hold(make_model):
    with pytest.raises(KVEvalError, match=r"layer 0.*head dimension 24"):
        CausalModel(make_model(head_dim=24), "auto")


def test_a_model_without_attention(tmp_path):
    from transformers import MambaConfig, MambaForCausalLM

    config = MambaConfig(
        vocab_size=256, hidden_size=32, num_hidden_layers=1, state_size=4, intermediate_size=64
    )
    MambaForCausalLM(config).save_pretrained(tmp_path)
    write_tokenizer(tmp_path)
    with pytest.raises(KVEvalError, match="no attention that goes through"):
        CausalModel(tmp_path, "auto")


def test_attention_that_is_not_causal(make_model):
    from ascend_plugin.kv_eval import routing

    with pytest.raises(KVEvalError, match="not plain causal"):
        routing._attention(torch.nn.Identity(), *[torch.zeros(1, 2, 3, 32)] * 3, None)


def test_chunked_attention(make_model):
    path = make_model(dtype="float32", architecture="qwen3")
    config = json.loads((path / "config.json").read_text())
    config["layer_types"] = ["chunked_attention", "full_attention"]
    (path / "config.json").write_text(json.dumps(config))
    with pytest.raises(KVEvalError, match="chunked attention"):
        CausalModel(path, "auto")
