"""vLLM in its own process, to complete prompts: ``python -m ascend_plugin.mtp.sample_worker``.

One JSON object per line: the first has the arguments of the engine, each later one a batch; the
answer to a batch is a JSON list of token ids per prompt, on what was stdout at start.
"""

from __future__ import annotations

import json
import os
import sys
from typing import Any


def main() -> None:
    """Answer batches until stdin ends."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    from vllm import LLM

    llm = LLM(**json.loads(sys.stdin.readline()))
    for line in sys.stdin:
        answers.write(json.dumps(complete(llm, json.loads(line))) + "\n")
        answers.flush()


def complete(llm: Any, batch: dict[str, Any]) -> list[list[int]]:
    """Return the completions of ``batch``: prompts, temperatures and seeds of equal length."""
    from vllm import SamplingParams

    parameters = [
        SamplingParams(
            temperature=temperature,
            seed=seed if temperature else None,
            max_tokens=batch["max_tokens"],
            stop_token_ids=batch["stop_token_ids"],
            detokenize=False,
        )
        for temperature, seed in zip(batch["temperatures"], batch["seeds"], strict=True)
    ]
    prompts = [{"prompt_token_ids": prompt} for prompt in batch["prompts"]]
    outputs = llm.generate(prompts, parameters, use_tqdm=False)
    return [list(output.outputs[0].token_ids) for output in outputs]


if __name__ == "__main__":
    main()
