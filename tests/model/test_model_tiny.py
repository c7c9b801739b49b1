"""The tiny random checkpoints: loadable, deterministic, and not degenerate."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from ascend_plugin.model.tiny import ARCHITECTURES, write_tiny_llama

transformers = pytest.importorskip("transformers")

CASES: list[tuple[str, dict[str, Any]]] = [
    *((name, {}) for name in ARCHITECTURES),
    ("mistral", {"sliding_window": 8}),
    ("gemma2", {"sliding_window": 8, "attn_softcap": 20.0}),
]


def load(path: Path) -> Any:
    """Loads a checkpoint and asserts that no weight is missing, unused or of a wrong shape."""
    model, report = transformers.AutoModelForCausalLM.from_pretrained(
        path, attn_implementation="eager", output_loading_info=True
    )
    # transformers does not know draft layers, which vLLM loads.
    unknown = [k for k in report.pop("unexpected_keys") if not k.startswith("model.mtp_layers.")]
    assert not unknown
    assert not any(report.values()), report
    return model


@pytest.mark.parametrize(("architecture", "options"), CASES)
def test_output_varies_and_depends_on_the_prompt(
    tmp_path: Path, architecture: str, options: dict[str, Any]
) -> None:
    model = load(write_tiny_llama(tmp_path, architecture=architecture, dtype="float32", **options))
    prompt = torch.randint(2, 256, (1, 24), generator=torch.Generator().manual_seed(1))
    changed = prompt.clone()
    changed[0, 18] = 99 + prompt[0, 18] % 2  # inside the window of 8
    with torch.no_grad():
        logits, other = model(prompt).logits, model(changed).logits
        text = model.generate(prompt, max_new_tokens=24, do_sample=False, eos_token_id=None)
    assert 1 < logits.std() < 6
    assert len(set(text[0, 24:].tolist())) >= 8
    assert (other[0, -1] - logits[0, -1]).abs().max() > 0.05
    # Experts multiply rows in groups, and sums over another group may round otherwise.
    torch.testing.assert_close(other[0, :18], logits[0, :18], rtol=0, atol=1e-5)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_the_dtype_is_kept(tmp_path: Path, dtype: str) -> None:
    assert load(write_tiny_llama(tmp_path, dtype=dtype)).dtype == getattr(torch, dtype)


def test_softcap_and_window_reach_the_model(tmp_path: Path) -> None:
    write_tiny_llama(tmp_path, architecture="gemma2", layers=3, sliding_window=8, attn_softcap=20.0)
    config = load(tmp_path).config
    assert (config.attn_logit_softcapping, config.sliding_window) == (20.0, 8)
    assert config.layer_types == ["sliding_attention", "full_attention", "sliding_attention"]


def test_the_seed_decides_the_bytes(tmp_path: Path) -> None:
    one, same, other = (
        (write_tiny_llama(tmp_path / name, seed=seed) / "model.safetensors").read_bytes()
        for name, seed in (("one", 1), ("same", 1), ("other", 2))
    )
    assert one == same
    assert one != other


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"architecture": "gpt2"}, "choose one of .*'qwen3'"),
        ({"dtype": "int8"}, "choose one of"),
        ({"kv_heads": 3}, "must be a multiple"),
        ({"head_dim": 33}, "head_dim even"),
        ({"sliding_window": 8}, "LlamaForCausalLM has none"),
        ({"architecture": "mistral", "attn_softcap": 8.0}, "MistralForCausalLM has none"),
        ({"architecture": "qwen2", "head_dim": 64}, "heads \\* head_dim = hidden = 128"),
    ],
)
def test_refusals(tmp_path: Path, options: dict[str, Any], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        write_tiny_llama(tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()
