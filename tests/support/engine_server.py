"""Runs vLLM engines one after the other in this process; see ``engines.py`` for the client.

Reads one JSON job per line from standard input and writes one JSON answer per line to the file
descriptor that is the first argument. A job names an engine and what to generate with it; an engine
is kept until a job names another one.
"""

from __future__ import annotations

import gc
import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from typing import Any

import draft_script
import mtp_faults
from measuring import unmeasured

#: What counters of speculation begin with.
_DRAFTS = "vllm:spec_decode_num_"


def main() -> None:
    answers = os.fdopen(int(sys.argv[1]), "w", buffering=1)
    keeper = EngineKeeper()
    for line in sys.stdin:
        job = json.loads(line)
        try:
            answer = keeper.serve(job)
        except Exception as error:
            keeper.stop()
            answer = {"failed": f"{type(error).__name__}: {error}"}
        answers.write(json.dumps(answer) + "\n")
    keeper.stop()


class EngineKeeper:
    """The one engine of this process."""

    def __init__(self) -> None:
        self.settings: dict[str, Any] | None = None
        self.llm: Any = None
        #: What graphs had done before the engine started.
        self.graphs: dict[str, int] = {}
        #: Memory of this process before the engine started, once that can be told.
        self.resident: int | None = None

    def serve(self, job: dict[str, Any]) -> dict[str, Any]:
        """Answer a job: the outputs of each of its runs, and what the engine is made of."""
        if job["engine"] != self.settings:
            self.stop()
            self.start(job["engine"])
        before = _counters()
        runs = [self._run(run) for run in job["runs"]]
        counted = {
            variant: [
                now - then for now, then in zip(counts, before.get(variant, [0] * 4), strict=True)
            ]
            for variant, counts in _counters().items()
        }
        return {
            "runs": runs,
            "metrics": self.metrics(),
            "made_of": self.made_of(),
            "counters": {variant: counts for variant, counts in counted.items() if counts[0]},
            "steps": self.steps(),
            "load": self.load(),
        }

    def start(self, settings: dict[str, Any]) -> None:
        with unmeasured(), _no_collection():
            from vllm import LLM
        # An engine asks for a full collection a dozen times; each would look at all that was
        # imported, which takes ten times as long as the rest of the start.
        gc.freeze()
        self.graphs = _graph_counts()
        self.resident = _resident()
        self.llm = LLM(**settings, disable_log_stats=False, seed=0)
        self.settings = settings

    def stop(self) -> None:
        """Drop the engine and everything that belongs to it."""
        if self.llm is None:
            return
        from vllm.distributed import cleanup_dist_env_and_memory

        with _no_collection():  # it would find nothing while the engine is held here
            self.llm.llm_engine.engine_core.shutdown()
        self.llm = self.settings = None
        gc.unfreeze()
        gc.collect()
        with _no_collection():
            cleanup_dist_env_and_memory()

    def _run(self, run: dict[str, Any]) -> dict[str, Any]:
        """Run one, and say how many drafts were made and accepted meanwhile."""
        before = self.metrics()
        with mtp_faults.planted(run.get("fault")), draft_script.played(run.get("script")):
            found = self.generate(run)
        drafts = {
            name.removeprefix(_DRAFTS): value - before.get(name, 0)
            for name, value in self.metrics().items()
            if name.startswith(_DRAFTS)
        }
        return found | ({"drafts": drafts} if drafts else {})

    def generate(self, run: dict[str, Any]) -> dict[str, Any]:
        """Generate greedily; a refused request is told, not raised."""
        from vllm import SamplingParams

        prompts = [
            prompt if isinstance(prompt, str) else {"prompt_token_ids": prompt}
            for prompt in run["prompts"]
        ]
        if run.get("embed"):
            outputs = self.llm.embed(prompts, use_tqdm=False)
            return {"embeddings": [output.outputs.embedding for output in outputs]}
        if run.get("beams"):
            return {"beams": self.beams(prompts, run)}
        if run.get("page_digests"):
            return {"page_digests": self.page_digests(run["page_digests"])}
        if run.get("score"):
            params = SamplingParams(max_tokens=1, prompt_logprobs=0, detokenize=False)
            return {"scores": [_scores(o) for o in self.llm.generate(prompts, params)]}
        options = {"temperature": 0.0, "logprobs": 2, **run.get("sampling", {})}
        if "logit_bias" in options:  # JSON has no numbers as keys
            options["logit_bias"] = {int(key): v for key, v in options["logit_bias"].items()}
        if "structured_outputs" in options:
            from vllm.sampling_params import StructuredOutputsParams

            options["structured_outputs"] = StructuredOutputsParams(**options["structured_outputs"])
        params = SamplingParams(
            max_tokens=run["max_tokens"], ignore_eos=True, detokenize=False, **options
        )
        adapters = _adapters(run["adapters"]) if "adapters" in run else None
        try:
            outputs = self.llm.generate(prompts, params, use_tqdm=False, lora_request=adapters)
        except Exception as error:
            return {"refused": f"{type(error).__name__}: {error}"}
        return {"outputs": [_plain(output) for output in outputs]}

    def beams(self, prompts: list[Any], run: dict[str, Any]) -> list[Any]:
        """Return tokens and summed logprob of every beam of each prompt."""
        from vllm.sampling_params import BeamSearchParams

        params = BeamSearchParams(run["beams"], run["max_tokens"], ignore_eos=True)
        found = self.llm.beam_search(prompts, params)
        return [
            [{"tokens": beam.tokens, "logprob": beam.cum_logprob} for beam in output.sequences]
            for output in found
        ]

    def page_digests(self, blocks: list[int]) -> list[str]:
        """Return a digest of these blocks' bytes for every layer."""
        import hashlib

        import torch

        return [
            hashlib.sha256(cache[blocks].cpu().contiguous().view(torch.uint8).numpy()).hexdigest()
            for cache in self._runner().kv_caches
        ]

    def _graphs(self) -> dict[str, dict[str, int]]:
        """What captured graphs did for this engine so far; nothing on a CPU."""
        counts = _graph_counts()
        return (
            {"graphs": {k: v - self.graphs.get(k, 0) for k, v in counts.items()}} if counts else {}
        )

    def _runner(self) -> Any:
        core = self.llm.llm_engine.engine_core.engine_core
        return core.model_executor.driver_worker.worker.model_runner

    def metrics(self) -> dict[str, float]:
        """Every counter and gauge of the engine, added up over its labels; vectors by place."""
        from vllm.v1.metrics.reader import Counter, Gauge, Vector

        totals: dict[str, float] = {}
        for metric in self.llm.get_metrics():
            if isinstance(metric, Counter | Gauge):
                totals[metric.name] = totals.get(metric.name, 0) + metric.value
            elif isinstance(metric, Vector):
                totals |= {f"{metric.name}_{i}": value for i, value in enumerate(metric.values)}
        return totals

    def _worker(self) -> Any:
        """The worker in this process; None: it has one of its own."""
        executor = self.llm.llm_engine.engine_core.engine_core.model_executor
        return getattr(getattr(executor, "driver_worker", None), "worker", None)

    def steps(self) -> dict[str, list[Any]]:
        """What was recorded on a CPU so far: steps, repetitions, and why no more are."""
        return {
            each.name: [each.recorded, each.repeated, each.given_up]
            for each in getattr(self._worker(), "recorded_steps", [])
        }

    def load(self) -> dict[str, Any]:
        """What loading the model took on a CPU, and what the process has grown by in all.

        The first engine of a process has the growth None: imports are most of it.
        """
        report = getattr(self._worker(), "load_report", None)
        if report is None:
            return {}
        grown = None if self.resident is None else _resident() - self.resident
        return {**asdict(report), "grown": grown}

    def made_of(self) -> dict[str, Any]:
        """What the engine really runs on, whatever it was asked for."""
        from vllm.platforms import current_platform

        core = self.llm.llm_engine.engine_core.engine_core
        if not hasattr(core.model_executor, "driver_worker"):  # the workers are processes
            return {"executor": type(core.model_executor).__name__}
        runner = self._runner()
        groups = [group for groups in runner.attn_groups for group in groups]
        return {
            "platform": type(current_platform).__name__,
            "worker": type(core.model_executor.driver_worker.worker).__name__,
            "backends": sorted({group.backend.__name__ for group in groups}),
            "block_sizes": sorted({group.kv_cache_spec.block_size for group in groups}),
            "dtypes": sorted({str(cache.dtype) for cache in runner.kv_caches}),
            "num_blocks": core.vllm_config.cache_config.num_gpu_blocks,
            "batched_tokens": core.vllm_config.scheduler_config.max_num_batched_tokens,
            "implementations": _implementations(),
            **self._graphs(),
        }


@contextmanager
def _no_collection() -> Iterator[None]:
    """Leave garbage where it is, also if somebody asks for its collection."""
    collect = gc.collect
    gc.disable()
    gc.collect = lambda generation=2: 0
    try:
        yield
    finally:
        gc.collect = collect
        gc.enable()


def _adapters(paths: list[str | None]) -> list[Any]:
    """Return a LoRA request, or None, for each prompt."""
    from vllm.lora.request import LoRARequest

    known = sorted(set(filter(None, paths)))
    return [path and LoRARequest(path, known.index(path) + 1, path) for path in paths]


def _counters() -> dict[str, list[int]]:
    """Counters of int8 caches so far, by variant."""
    if "ascend_plugin.kv_cache.counters" not in sys.modules:
        return {}
    totals: dict[str, list[int]] = {}
    read = sys.modules["ascend_plugin.kv_cache.counters"].read_counters
    for (_, variant), counts in read().items():
        known = totals.get(variant, [0] * len(counts))
        totals[variant] = [a + b for a, b in zip(known, counts, strict=True)]
    return totals


def _resident() -> int | None:
    """Memory of this process, if an engine of the plugin was here."""
    if "ascend_plugin.worker.cpu_memory" not in sys.modules:
        return None
    resident: int | None = sys.modules["ascend_plugin.worker.cpu_memory"].resident_bytes()
    return resident


def _graph_counts() -> dict[str, int]:
    """What captured graphs did so far in this process, on an NPU."""
    if "ascend_plugin.graph.npu" not in sys.modules:
        return {}
    counts: dict[str, int] = asdict(sys.modules["ascend_plugin.graph.npu"].counts)
    return counts


def _implementations() -> dict[str, list[str]]:
    """Names of the implementations that served calls so far, by operator that was called."""
    if "ascend_plugin.ops.dispatch" not in sys.modules:
        return {}
    operators = sys.modules["ascend_plugin.ops.dispatch"].operators()
    return {
        name: sorted({choice.implementation.name for choice in operator._choices.values()})
        for name, operator in operators.items()
        if operator._choices
    }


def _scores(output: Any) -> list[float]:
    """Return the logprob of every token of a prompt but the first."""
    ranked = zip(output.prompt_token_ids[1:], output.prompt_logprobs[1:], strict=True)
    return [entries[token].logprob for token, entries in ranked]


def _plain(output: Any) -> dict[str, Any]:
    """Return tokens, their logprobs, and how far the best was from the second at each step."""
    completion = output.outputs[0]
    tokens = list(completion.token_ids)
    chosen, margins = [], []
    for token, ranked in zip(tokens, completion.logprobs, strict=True):
        chosen.append(ranked[token].logprob)
        best = sorted((entry.logprob for entry in ranked.values()), reverse=True)
        margins.append(best[0] - best[1])
    return {
        "tokens": tokens,
        "logprobs": chosen,
        "margins": margins,
        "cached": output.num_cached_tokens,
    }


if __name__ == "__main__":
    main()
