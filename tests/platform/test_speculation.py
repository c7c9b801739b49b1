"""What is said and set when speculation is asked for."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from ascend_plugin.model.tiny import write_tiny_llama
from ascend_plugin.spec_decode.token_order import TokenOrder, save_order
from ascend_plugin.worker.torch_kernels import expand

MTP = {"method": "mtp", "num_speculative_tokens": 2}


def configure(path: Path, speculation: dict[str, object] | None, **settings: object) -> object:
    from vllm import EngineArgs

    arguments = {"model": str(path), "skip_tokenizer_init": True, "max_model_len": 256}
    return EngineArgs(
        **arguments,
        speculative_config=speculation,
        additional_config={"speculation": settings} if settings else {},
    ).create_engine_config()


@pytest.fixture(scope="module")
def mimo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    shape = {"architecture": "mimo", "hidden": 256, "heads": 4, "kv_heads": 2, "head_dim": 64}
    return write_tiny_llama(tmp_path_factory.mktemp("mimo") / "model", dtype="float32", **shape)


def test_a_model_without_a_layer_is_told(tmp_path) -> None:
    path = write_tiny_llama(tmp_path / "plain", dtype="float32")
    with pytest.raises(ValueError, match=r"\(LlamaForCausalLM\) has no MTP layer\. Train one with"):
        configure(path, MTP)


def test_a_model_with_a_layer_is_taken(mimo) -> None:
    config = configure(mimo, MTP)
    assert config.speculative_config.draft_model_config.architectures == ["MiMoMTPModel"]


@pytest.mark.parametrize(
    ("method", "settings", "message"),
    [
        (None, {"draft_head": {"tokens": 9}}, "speculation.draft_head.tokens=9, but there is no"),
        (None, {"draft_head": {"file": "f"}}, r"speculation.draft_head.file='f', but there is no"),
        (None, {"adaptive": True}, r"speculation.adaptive=True, but there is no speculation"),
        ("mtp", {"draft_head": {"tokens": 9}}, "does not say which tokens are frequent. Make a"),
        ("mtp", {"draft_head": {"file": "/none"}}, "/none cannot be read as an order of tokens"),
        ("ngram", {"draft_head": {"tokens": 9}}, "serves the methods mtp, eagle, draft_model"),
    ],
)
def test_settings_that_cannot_be_served(mimo, method, settings, message) -> None:
    ngram = {"method": "ngram", "num_speculative_tokens": 2, "prompt_lookup_max": 3}
    with pytest.raises(ValueError, match=message):
        configure(mimo, {"mtp": MTP, "ngram": ngram}.get(method), **settings)


def test_an_order_of_another_model_is_refused(mimo, tmp_path) -> None:
    head = tmp_path / "head.safetensors"
    save_order(head, TokenOrder(torch.arange(5).int(), 77), {})
    with pytest.raises(ValueError, match=r"orders a vocabulary of 77 tokens, and the model has \d"):
        configure(mimo, MTP, draft_head={"file": str(head)})
    size = configure(mimo, None).model_config.get_vocab_size()
    save_order(head, TokenOrder(torch.arange(5).int(), size), {})
    with pytest.raises(ValueError, match="tokens=6 is more than is known: the order has 5 tokens"):
        configure(mimo, MTP, draft_head={"file": str(head), "tokens": 6})
    assert configure(mimo, MTP, draft_head={"file": str(head), "tokens": 5})


def test_settings_that_ask_for_nothing_need_no_speculation(mimo) -> None:
    assert configure(mimo, None, adaptive=False, draft_head={"tokens": 0})


def test_the_patch_is_applied_once() -> None:
    from vllm.config.speculative import SpeculativeConfig

    from ascend_plugin.compat import apply_patches

    apply_patches()
    before = SpeculativeConfig.__post_init__
    apply_patches()
    assert SpeculativeConfig.__post_init__ is before


def test_values_are_expanded_whatever_their_type() -> None:
    """Of three sequences with 2, 0 and 3 drafts; a temperature of 0 becomes 1."""
    ends = torch.tensor([2, 2, 5], dtype=torch.int32)
    for values in (torch.tensor([0.7, 9.0, 0.0]), torch.tensor([5, 9, 0], dtype=torch.int32)):
        found = torch.full((5,), -7, dtype=values.dtype)
        expand(found, values, ends, 0, 1)
        first = values[0].item()
        assert found.tolist() == [first, first, 1, 1, 1]


def test_vllm_still_needs_it() -> None:
    """Guards ``replace_on_cpus``: if this fails, vLLM was repaired and ours can go."""
    from vllm.platforms import current_platform
    from vllm.utils.cpu_triton_utils import _expand_kernel_impl

    current_platform.import_kernels()
    found = torch.full((2,), -7.0)
    _expand_kernel_impl(found, torch.tensor([0.7]), torch.tensor([2]), 0, 1)
    assert found.tolist() == [-7.0, -7.0]
