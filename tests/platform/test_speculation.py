"""What is said and set when speculation is asked for."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from ascend_plugin.model.tiny import write_tiny_llama
from ascend_plugin.worker.torch_kernels import expand

MTP = {"method": "mtp", "num_speculative_tokens": 2}


def configure(path: Path, speculation: dict[str, object]) -> object:
    from vllm import EngineArgs

    arguments = {"model": str(path), "skip_tokenizer_init": True, "max_model_len": 256}
    return EngineArgs(**arguments, speculative_config=speculation).create_engine_config()


def test_a_model_without_a_layer_is_told(tmp_path) -> None:
    path = write_tiny_llama(tmp_path / "plain", dtype="float32")
    with pytest.raises(ValueError, match=r"\(LlamaForCausalLM\) has no MTP layer\. Train one with"):
        configure(path, MTP)


def test_a_model_with_a_layer_is_taken(tmp_path) -> None:
    shape = {"architecture": "mimo", "hidden": 256, "heads": 4, "kv_heads": 2, "head_dim": 64}
    path = write_tiny_llama(tmp_path / "mimo", dtype="float32", **shape)
    config = configure(path, MTP)
    assert config.speculative_config.draft_model_config.architectures == ["MiMoMTPModel"]


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
