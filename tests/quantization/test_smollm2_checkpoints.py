"""SmolLM2 as real tools quantised it (``make checkpoints``), served against an oracle."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from engines import EngineProcess
from quant_oracle import read_meaning

pytestmark = [pytest.mark.engine, pytest.mark.model, pytest.mark.slow]

MODELS = Path(__file__).resolve().parents[2] / "models"
MADE = sorted(path.parent for path in (MODELS / "quantised").glob("*/config.json"))

QUESTION = "What is the capital of France?"


@pytest.mark.skipif(not MADE, reason="no checkpoints in models/quantised; run: make checkpoints")
@pytest.mark.parametrize("folder", MADE, ids=lambda path: path.name)
def test_answer_and_logprobs(plugin: EngineProcess, folder: Path) -> None:
    """The oracle in transformers gives the answer's tokens the same logprobs; it is about France.

    Not all name Paris: w8a8-rtn answers in French that France's capital is France.
    """
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(MODELS / "smollm2")
    turns = [{"role": "user", "content": QUESTION}]
    prompt = tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_dict=False)
    engine = {
        "model": str(folder),
        "dtype": "float32",
        "skip_tokenizer_init": True,
        "enforce_eager": True,
        "max_model_len": 512,
        "kv_cache_memory_bytes": 1 << 28,
    }
    (output,) = plugin.run(engine, {"prompts": [list(prompt)], "max_tokens": 24}).outputs()
    answer = tokenizer.decode(output.tokens)
    assert "France" in answer, answer
    meant = read_meaning(folder)
    expected = _logprobs(folder, [*prompt, *output.tokens])[len(prompt) - 1 : -1]
    chosen = expected[torch.arange(len(output.tokens)), output.tokens]
    off = float((chosen - torch.tensor(output.logprobs)).abs().max())
    assert off < (0.5 if meant.fakes or meant.kv_scales else 0.02), off


def _logprobs(folder: Path, tokens: list[int]) -> torch.Tensor:
    """Return what transformers computes with the oracle's weights, and inputs quantised by it."""
    from transformers import LlamaConfig, LlamaForCausalLM

    meant = read_meaning(folder)
    config = json.loads((folder / "config.json").read_text())
    config.pop("quantization_config", None)
    model = LlamaForCausalLM(LlamaConfig(**config)).float()
    weights = {name: weight.float() for name, weight in meant.weights.items()}
    missing, unexpected = model.load_state_dict(weights, strict=False)
    assert not unexpected
    assert set(missing) <= {"lm_head.weight"}
    model.tie_weights()
    for module, fake in meant.fakes.items():
        model.get_submodule(module).register_forward_pre_hook(
            lambda _, args, fake=fake: (fake(args[0]).float(), *args[1:])
        )
    with torch.no_grad():
        return model.eval()(input_ids=torch.tensor([tokens])).logits[0].log_softmax(-1)
