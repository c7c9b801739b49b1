"""SmolLM2 as real tools quantised it (``make checkpoints``), on the NPU against an oracle."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from engines import EngineProcess
from npu_engines import settings
from smollm2_oracle import MADE, NONE_MADE, SmolLM2Oracle, question, text

pytestmark = [pytest.mark.engine, pytest.mark.model, pytest.mark.slow]

#: Of a bfloat16: every result of a layer is rounded so. And what that does to logprobs on average,
#: after 30 layers whose inputs are not quantised.
ROUNDING, TOLERANCE = 2.0**-8, 0.1


@pytest.mark.skipif(not MADE, reason=NONE_MADE)
@pytest.mark.parametrize("folder", MADE, ids=lambda path: path.name)
def test_answer_and_logprobs(npu: EngineProcess, folder: Path) -> None:
    prompt = question()
    answer = npu.run(settings(str(folder)), {"prompts": [prompt], "max_tokens": 8})
    assert answer.made_of["platform"] == "AscendNPUPlatform"
    (output,) = answer.outputs()
    oracle = SmolLM2Oracle(folder, [*prompt, *output.tokens], len(output.tokens))
    assert list(answer.counters) == (["c8s"] if oracle.quantises_keys else [])
    off = (oracle.logprobs() - torch.tensor(output.logprobs)).abs()
    allowed = 2 * oracle.spread(ROUNDING) if oracle.quantises_inputs else TOLERANCE
    assert float(off.mean()) < max(TOLERANCE, allowed), (text(output.tokens), off)
