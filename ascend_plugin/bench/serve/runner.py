"""Runs ``bench serve``: all engines alive at once, working in turn."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

from ascend_plugin.bench.elements import Element
from ascend_plugin.bench.errors import BenchError
from ascend_plugin.bench.serve import messages
from ascend_plugin.bench.serve.contest import Contest, cache_bytes, require_fit
from ascend_plugin.bench.serve.driver import (
    LLAMA_CPP,
    OURS,
    STOCK,
    WorkerProcess,
    worker_environment,
)
from ascend_plugin.bench.serve.models import ServeModel
from ascend_plugin.bench.serve.rows import Measured, ServeRow, make_row
from ascend_plugin.bench.serve.settings import STEP_TOKENS, Settings
from ascend_plugin.config import INT8_DTYPE

Report = Callable[[str], None]

_DTYPES: dict[Element, str] = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}


@dataclass(frozen=True, slots=True)
class Outcome:
    """Rows, and per model and contender what really ran and on which checkpoint."""

    rows: list[ServeRow]
    engines: dict[str, dict[str, messages.Loaded]]
    checkpoints: dict[str, dict[str, str | None]]

    @property
    def isa(self) -> str | None:
        """Instruction set of our kernels; equal for every model."""
        return next((engines[OURS.name].kernels for engines in self.engines.values()), None)


def run_contests(
    contests: Sequence[Contest], settings: Settings, logs: Path, report: Report
) -> Outcome:
    """Measure every model with every number of requests at every context.

    Args:
        contests: what to serve.
        settings: how.
        logs: folder for the engines' logs.
        report: called with a line before each step.

    Raises:
        BenchError: a context is too long, memory is too small, an engine failed, or the engines
            do not run what they should.
    """
    for contest in contests:
        require_fit(contest, settings)
    outcome = Outcome([], {}, {})
    for contest in contests:
        name = contest.ours.name
        with _workers(contest, settings.threads, logs) as workers:
            report(f"{name}: starting {len(workers)} engines")
            outcome.engines[name] = _load(contest, settings, workers)
            outcome.checkpoints[name] = contest.checkpoints()
            _warm_up(contest.ours, settings, workers)
            for batch in settings.batches:
                for context in settings.contexts:
                    report_case = _labelled(report, f"{name}, batch {batch}, context {context}")
                    measured = _run_case(
                        contest.ours, batch, context, settings, workers, report_case
                    )
                    outcome.rows.append(
                        make_row(name, batch, context, settings, measured, contest.same_weights)
                    )
    return outcome


def _labelled(report: Report, label: str) -> Report:
    return lambda line: report(f"{label}: {line}")


@contextmanager
def _workers(contest: Contest, threads: int, logs: Path) -> Iterator[list[WorkerProcess]]:
    workers: list[WorkerProcess] = []
    try:
        for spec in contest.specs:
            workers.append(WorkerProcess(spec, threads, logs / f"{spec.name}.log"))
        yield workers
    finally:
        for worker in workers:
            worker.close()


def _load(
    contest: Contest, settings: Settings, workers: Sequence[WorkerProcess]
) -> dict[str, messages.Loaded]:
    """Start all engines, at the same time: nothing is measured yet."""
    for worker in workers:
        worker.send(_load_command(contest, settings, worker))
    loaded = {}
    for worker in workers:
        loaded[worker.spec.name] = worker.receive(messages.Loaded)
        _check_engine(worker, loaded[worker.spec.name], settings.threads)
    return loaded


def _load_command(contest: Contest, settings: Settings, worker: WorkerProcess) -> messages.Command:
    if worker.spec is LLAMA_CPP:
        return messages.LoadGguf(
            path=str(contest.gguf),
            vocabulary=contest.ours.vocabulary,
            threads=settings.threads,
            max_model_len=settings.max_length,
            max_num_seqs=settings.max_batch,
            max_num_batched_tokens=STEP_TOKENS,
        )
    ours = worker.spec is OURS
    model = contest.ours if ours else contest.stock
    assert model is not None
    int8 = settings.kv_cache_settings() if ours else {}
    return messages.Load(
        model=str(model.path),
        load_format=model.load_format,
        dtype=_DTYPES[settings.element],
        execution=settings.execution,
        max_model_len=settings.max_length,
        max_num_seqs=settings.max_batch,
        max_num_batched_tokens=STEP_TOKENS,
        kv_cache_bytes=cache_bytes(model, settings),
        kv_cache_dtype=INT8_DTYPE if int8 else "auto",
        additional_config={"kv_cache": int8} if int8 else {},
    )


def _check_engine(worker: WorkerProcess, loaded: messages.Loaded, threads: int) -> None:
    """Refuse to measure something else than the table will say."""
    if loaded.platform.partition(".")[0].split()[0] != worker.spec.platform_of:
        raise BenchError(
            f"the engine of {worker.spec.name} runs on {loaded.platform}. Run ascend-plugin doctor."
        )
    if loaded.threads != threads:
        raise BenchError(
            f"the engine of {worker.spec.name} uses {loaded.threads} threads instead of {threads}. "
            "Unset OpenMP variables (OMP_*, KMP_*, GOMP_*) and the CPU affinity."
        )


def _warm_up(model: ServeModel, settings: Settings, workers: Sequence[WorkerProcess]) -> None:
    """Run every number of requests once: engines compile or record what they meet first."""
    for batch in settings.batches:
        prompts = [[3] * min(16, model.vocabulary - 1)] * batch
        for worker in workers:
            worker.ask(messages.Prefill(prompts, 8 + batch), messages.Prefilled)
            worker.ask(messages.Decode(2), messages.Decoded)
            worker.ask(messages.Finish(), messages.Finished)


def _run_case(
    model: ServeModel,
    batch: int,
    context: int,
    settings: Settings,
    workers: Sequence[WorkerProcess],
    report: Report,
) -> dict[str, Measured]:
    """Measure one case; return each contender's part by its name."""
    prompts = random_prompts(model.vocabulary, batch, context)
    prefill = messages.Prefill(prompts, settings.max_tokens(batch, context))
    first: dict[str, list[float]] = {}
    turns = list(reversed(workers))
    for worker in turns:
        report(f"prefill of {worker.spec.name}")
        first[worker.spec.name] = worker.ask(prefill, messages.Prefilled).first_token_s
    seconds: dict[str, list[float]] = {worker.spec.name: [] for worker in workers}
    for number in range(settings.rounds):
        report(f"decode round {number + 1} of {settings.rounds}")
        for worker in workers if number % 2 else turns:
            answer = worker.ask(messages.Decode(settings.new_tokens), messages.Decoded)
            seconds[worker.spec.name].append(answer.seconds)
    measured = {}
    for worker in workers:
        name = worker.spec.name
        end = worker.ask(messages.Finish(), messages.Finished)
        measured[name] = Measured(first[name], seconds[name], end.tokens, end.note)
    return measured


def random_prompts(vocabulary: int, batch: int, length: int) -> list[list[int]]:
    """Return prompts of random token ids, always the same ones."""
    generator = random.Random(0)
    return [[generator.randrange(2, vocabulary) for _ in range(length)] for _ in range(batch)]


def method(settings: Settings, outcome: Outcome) -> dict[str, object]:
    """Return how it was measured, for ``meta``."""
    return {
        "interleaving": "all engines stay alive, one computes at a time; decode rounds A B, B A",
        "decode_tok_s": "median over rounds; every step serves all requests",
        "ttft_ms": "median over requests submitted at once; one prefill of each engine",
        "ratio_vs_stock": "median over rounds of stock time / our time",
        "ratio_vs_peer": "median over rounds of the peer's time / our time",
        "execution": settings.execution,
        "kv_cache": settings.kv_cache_settings() or "not quantised",
        "prefix_caching": False,
        "max_num_batched_tokens": STEP_TOKENS,
        "environment": {
            name: value
            for name, value in worker_environment(OURS, settings.threads, {}).items()
            if name != "VLLM_PLUGINS"
        },
        "VLLM_PLUGINS": {spec.name: spec.plugins for spec in (OURS, STOCK)},
        "checkpoints": outcome.checkpoints,
        "engines": {
            model: {name: asdict(loaded) for name, loaded in engines.items()}
            for model, engines in outcome.engines.items()
        },
    }
