"""One engine in one process, to measure drafts: ``python -m ascend_plugin.mtp.eval_worker``.

One JSON object per line: the first has the arguments of the engine, each later one a batch. The
answer to a batch has the tokens, the speed of decoding, and the counters of speculation.
"""

from __future__ import annotations

import json
import os
import sys
import time
from typing import Any

#: What the counters of speculation begin with.
_COUNTERS = "vllm:spec_decode_num_"


class Engine:
    """vLLM's engine, stepped by hand in this process."""

    def __init__(self, settings: dict[str, Any]) -> None:
        """Load the model."""
        from vllm import LLM

        self._llm: Any = LLM(**settings)
        self._batches = 0

    def generate(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Complete prompts greedily, ``batch["size"]`` at a time.

        Speed is that of steps between the last request's first token and the first request's end:
        all requests decode, none prefills.
        """
        before = self._counters()
        prompts, size = batch["prompts"], batch["size"]
        tokens: list[list[int]] = []
        decoded, seconds = 0, 0.0
        for start in range(0, len(prompts), size):
            found, count, took = self._group(prompts[start : start + size], batch)
            tokens += found
            decoded, seconds = decoded + count, seconds + took
        after = self._counters()
        counters = {name: after[name] - before.get(name, 0) for name in after}
        return {
            "tokens": tokens,
            "decoded": decoded,
            "seconds": seconds,
            "counters": counters,
            "speculation": self._speculation(),
        }

    def _speculation(self) -> dict[str, object]:
        """Return how the engine drafts, as it is configured by default."""
        from ascend_plugin.config import parse_config
        from ascend_plugin.spec_decode.prepare import describe

        config = self._llm.llm_engine.vllm_config
        return describe(config, parse_config(config.additional_config).speculation)

    def _group(
        self, prompts: list[list[int]], batch: dict[str, Any]
    ) -> tuple[list[list[int]], int, float]:
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        parameters = SamplingParams(
            temperature=0.0,
            max_tokens=batch["max_tokens"],
            stop_token_ids=batch["stop_token_ids"],
            detokenize=False,
            output_kind=RequestOutputKind.DELTA,
        )
        engine = self._llm.llm_engine
        self._batches += 1
        found: dict[str, list[int]] = {}
        for i, prompt in enumerate(prompts):
            found[f"{self._batches}-{i}"] = []
            engine.add_request(f"{self._batches}-{i}", {"prompt_token_ids": prompt}, parameters)
        decoded, seconds, full = 0, 0.0, True
        while engine.has_unfinished_requests():
            decoding = full and all(found.values())
            started = time.perf_counter()
            outputs = engine.step()
            took = time.perf_counter() - started
            for output in outputs:
                new = list(output.outputs[0].token_ids)
                found[output.request_id] += new
                decoded += len(new) if decoding else 0
                full &= not output.finished
            seconds += took if decoding else 0.0
        return list(found.values()), decoded, seconds

    def _counters(self) -> dict[str, float]:
        from vllm.v1.metrics.reader import Counter, Vector

        found: dict[str, float] = {}
        for metric in self._llm.get_metrics():
            if not metric.name.startswith(_COUNTERS):
                continue
            name = metric.name.removeprefix(_COUNTERS)
            if isinstance(metric, Counter):
                found[name] = found.get(name, 0) + metric.value
            elif isinstance(metric, Vector):
                found |= {f"{name}_{i}": value for i, value in enumerate(metric.values)}
        return found


def main() -> None:
    """Answer batches until stdin ends."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    engine = Engine(json.loads(sys.stdin.readline()))
    for line in sys.stdin:
        answers.write(json.dumps(engine.generate(json.loads(line))) + "\n")
        answers.flush()


if __name__ == "__main__":
    main()
