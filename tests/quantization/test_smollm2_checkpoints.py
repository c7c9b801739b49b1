"""SmolLM2 as real tools quantised it (``make checkpoints``), served against an oracle."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from engines import EngineProcess
from smollm2_oracle import MADE, NONE_MADE, SmolLM2Oracle, question, text

pytestmark = [pytest.mark.engine, pytest.mark.model, pytest.mark.slow]


@pytest.mark.skipif(not MADE, reason=NONE_MADE)
@pytest.mark.parametrize("folder", MADE, ids=lambda path: path.name)
def test_answer_and_logprobs(plugin: EngineProcess, folder: Path) -> None:
    """An oracle in transformers gives the answer's tokens the same logprobs; it is about France.

    Not all name Paris: w8a8-rtn answers in French that France's capital is France.
    """
    prompt = question()
    engine = {
        "model": str(folder),
        "dtype": "float32",
        "skip_tokenizer_init": True,
        "enforce_eager": True,
        "max_model_len": 512,
        "kv_cache_memory_bytes": 1 << 28,
    }
    (output,) = plugin.run(engine, {"prompts": [prompt], "max_tokens": 24}).outputs()
    assert "France" in text(output.tokens)
    oracle = SmolLM2Oracle(folder, [*prompt, *output.tokens], len(output.tokens))
    off = (oracle.logprobs() - torch.tensor(output.logprobs)).abs()
    if oracle.quantises_inputs:
        assert float(off.mean()) < 2 * oracle.spread(noise=1e-5), off
    else:
        assert float(off.max()) < 0.02, off
