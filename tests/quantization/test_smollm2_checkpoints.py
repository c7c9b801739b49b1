"""SmolLM2 as real tools quantised it (``make checkpoints``), served against an oracle."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from engines import EngineProcess
from quant_oracle import read_meaning
from transformers import DynamicCache

pytestmark = [pytest.mark.engine, pytest.mark.model, pytest.mark.slow]

MODELS = Path(__file__).resolve().parents[2] / "models"
MADE = sorted(path.parent for path in (MODELS / "quantised").glob("*/config.json"))

QUESTION = "What is the capital of France?"


@pytest.mark.skipif(not MADE, reason="no checkpoints in models/quantised; run: make checkpoints")
@pytest.mark.parametrize("folder", MADE, ids=lambda path: path.name)
def test_answer_and_logprobs(plugin: EngineProcess, folder: Path) -> None:
    """An oracle in transformers gives the answer's tokens the same logprobs; it is about France.

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
    oracle = _Oracle(folder, [*prompt, *output.tokens], len(output.tokens))
    off = (oracle.logprobs() - torch.tensor(output.logprobs)).abs()
    if not oracle.quantises_inputs:
        assert float(off.max()) < 0.02, off
        return
    # Codes of inputs turn a sum's last bits into a step of 1/127, and that into others: after 30
    # layers right answers are as far apart as the oracle's for embeddings that hardly differ.
    allowed = 2 * max(float(oracle.sensitivity(seed).mean()) for seed in range(5))
    assert float(off.mean()) < allowed, (off, allowed)


class _QuantisedPages(DynamicCache):
    """Keys and values as static int8 leaves them.

    Args:
        scales: by layer, ``[2, kv_heads, head_dim]``.
    """

    def __init__(self, scales: dict[int, torch.Tensor]) -> None:
        super().__init__()
        self._scales = scales

    def update(
        self, keys: torch.Tensor, values: torch.Tensor, layer: int, *rest: Any, **named: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Round what is added, ``[1, kv_heads, tokens, head_dim]``."""
        added = []
        for side, rows in enumerate((keys, values)):
            scale = self._scales[layer][side][:, None]  # [kv_heads, 1, head_dim]
            added.append((rows / scale).round().clamp(-127, 127) * scale)
        return super().update(*added, layer, *rest, **named)


class _Oracle:
    """transformers with the weights that the oracle reads, and inputs quantised by it.

    Args:
        folder: the checkpoint.
        tokens: a prompt and its answer.
        answered: how many of them are the answer.
    """

    def __init__(self, folder: Path, tokens: list[int], answered: int) -> None:
        from transformers import LlamaConfig, LlamaForCausalLM

        meant = read_meaning(folder)
        config = json.loads((folder / "config.json").read_text())
        config.pop("quantization_config", None)
        self._model = LlamaForCausalLM(LlamaConfig(**config)).float().eval()
        weights = {name: weight.float() for name, weight in meant.weights.items()}
        missing, unexpected = self._model.load_state_dict(weights, strict=False)
        assert not unexpected
        assert set(missing) <= {"lm_head.weight"}
        self._model.tie_weights()
        for module, fake in meant.fakes.items():
            self._model.get_submodule(module).register_forward_pre_hook(
                lambda _, args, fake=fake: (fake(args[0]).float(), *args[1:])
            )
        self._tokens = torch.tensor(tokens)
        self._answered = answered
        self._kv_scales = meant.kv_scales
        self.quantises_inputs = bool(meant.fakes or meant.kv_scales)

    @torch.no_grad()
    def logprobs(self, seed: int | None = None) -> torch.Tensor:
        """Return the logprobs of the answer's tokens; a seed changes embeddings a little."""
        embeddings = self._model.get_input_embeddings()(self._tokens)
        if seed is not None:
            generator = torch.Generator().manual_seed(seed)
            embeddings *= 1 + 1e-5 * torch.randn(embeddings.shape, generator=generator)
        pages = _QuantisedPages(self._kv_scales) if self._kv_scales else None
        found = self._model(inputs_embeds=embeddings[None], past_key_values=pages)
        logits = found.logits[0]
        at = logits[-self._answered - 1 : -1].log_softmax(-1)
        return at.gather(-1, self._tokens[-self._answered :, None]).squeeze(-1)

    def sensitivity(self, seed: int) -> torch.Tensor:
        """Return by how much logprobs change when embeddings are rounded differently."""
        return (self.logprobs(seed) - self.logprobs()).abs()
