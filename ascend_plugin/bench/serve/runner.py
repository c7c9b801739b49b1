"""Runs ``bench serve``: two engines alive at once, working in turn."""

from __future__ import annotations

import random
import statistics
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from ascend_plugin.bench import machine
from ascend_plugin.bench.attention.cases import (
    VARIANTS,
    Variant,
    element_of,
    is_fast,
    quantisation_of,
)
from ascend_plugin.bench.elements import Element
from ascend_plugin.bench.errors import BenchError
from ascend_plugin.bench.serve import messages
from ascend_plugin.bench.serve.driver import OURS, STOCK, WorkerProcess, worker_environment
from ascend_plugin.bench.serve.models import ServeModel
from ascend_plugin.config import INT8_DTYPE

Report = Callable[[str], None]

_DTYPES: dict[Element, str] = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}

#: Tokens of a step: what vLLM's offline engine takes on a CPU.
STEP_TOKENS = 4096
_BLOCK = 128

#: Beside weights and cache: torch, vLLM and the activations of a step.
_PROCESS_BYTES = 2 * 2**30


@dataclass(frozen=True, slots=True)
class Settings:
    """What is measured.

    Attributes:
        batch: requests at once.
        contexts: prompt lengths.
        new_tokens: decode steps of a round.
        rounds: decode rounds of each contender.
        threads: OpenMP threads of each contender.
        variant: element type of weights and cache, or how our int8 cache is scaled (then the
            weights and vLLM's cache are bf16).
        eager: without torch.compile.
        scales: file of static scales, for the variants that need one.
    """

    batch: int
    contexts: tuple[int, ...]
    new_tokens: int
    rounds: int
    threads: int
    variant: Variant
    eager: bool
    scales: Path | None = None

    def __post_init__(self) -> None:
        """Refuse impossible values.

        Raises:
            BenchError: a value out of its bounds.
        """
        bounds = {
            "--batch": (self.batch, 1, STEP_TOKENS // 2),
            "--new-tokens": (self.new_tokens, 1, 10_000),
            "--rounds": (self.rounds, 1, 1000),
            "--threads": (self.threads, 1, machine.available_cpus()),
        }
        for option, (value, low, high) in bounds.items():
            if not low <= value <= high:
                raise BenchError(f"{option} {value} is not possible; use {low} to {high}.")
        for context in self.contexts:
            if context < 1:
                raise BenchError(f"--context {context} must be at least 1.")
        if self.variant not in VARIANTS:
            raise BenchError(f"--variant {self.variant} is unknown; use {', '.join(VARIANTS)}.")
        static = quantisation_of(self.variant) in ("c8s", "c8p")
        if static != (self.scales is not None):
            raise BenchError(
                f"--variant {self.variant} needs --scales FILE, the static scales of the model; "
                "make it with: ascend-plugin calibrate kv."
                if static
                else f"--scales {self.scales} is of no use to --variant {self.variant}; leave it "
                "out, or use --variant c8s or c8p."
            )

    @property
    def element(self) -> Element:
        """Element type of the weights and of vLLM's cache."""
        return element_of(self.variant)

    def kv_cache_settings(self) -> dict[str, Any]:
        """Return the plugin's settings of an int8 cache; empty: it is not int8."""
        variant = quantisation_of(self.variant)
        if variant is None:
            return {}
        settings = {"variant": variant, "precision": "fast" if is_fast(self.variant) else "exact"}
        return settings | ({"scales": str(self.scales)} if self.scales else {})

    def max_tokens(self, context: int) -> int:
        """Output tokens that no request may reach before all rounds are done.

        The first request decodes while the last is still being prefilled.
        """
        prefill_steps = -(-self.batch * context // (STEP_TOKENS - self.batch)) + self.batch
        return prefill_steps + self.rounds * self.new_tokens + 2


@dataclass(frozen=True, slots=True)
class ServeRow:
    """One row of the result; docs in benchmarks/README.md."""

    model: str
    variant: str
    batch: int
    context: int
    new_tokens: int
    rounds: int
    threads: int
    decode_tok_s: float
    stock_decode_tok_s: float
    ratio_vs_stock: float
    ttft_ms: float
    stock_ttft_ms: float
    ttft_ratio_vs_stock: float
    tokens_equal_prefix: int
    tokens_compared: int
    note: str | None


@dataclass(frozen=True, slots=True)
class Outcome:
    """Rows, and per model and contender what really ran."""

    rows: list[ServeRow]
    engines: dict[str, dict[str, messages.Loaded]]

    @property
    def isa(self) -> str | None:
        """Instruction set of our kernels; equal for every model."""
        return next((engines[OURS.name].kernels for engines in self.engines.values()), None)


@dataclass(frozen=True, slots=True)
class _Measured:
    """One contender's part of a case."""

    first_token_s: list[float]
    round_s: tuple[float, ...]
    tokens: list[list[int]]


def run_models(
    models: Sequence[ServeModel], settings: Settings, logs: Path, report: Report
) -> Outcome:
    """Measure every model at every context.

    Args:
        models: what to serve.
        settings: how.
        logs: folder for the engines' logs.
        report: called with a line before each step.

    Raises:
        BenchError: a context is too long, memory is too small, an engine failed, or the two
            engines do not run what they should.
    """
    for model in models:
        _require_fit(model, settings)
    rows, engines = [], {}
    for model in models:
        with _engines(settings.threads, logs) as (ours, stock):
            report(f"{model.name}: starting both engines")
            engines[model.name] = _load(model, settings, ours, stock)
            _warm_up(model, ours, stock)
            for context in settings.contexts:
                label = f"{model.name}, batch {settings.batch}, context {context}"
                rows.append(_run_case(model, context, settings, ours, stock, label, report))
    return Outcome(rows, engines)


@contextmanager
def _engines(threads: int, logs: Path) -> Iterator[tuple[WorkerProcess, WorkerProcess]]:
    workers: list[WorkerProcess] = []
    try:
        for spec in (OURS, STOCK):
            workers.append(WorkerProcess(spec, threads, logs / f"{spec.name}.log"))
        yield workers[0], workers[1]
    finally:
        for worker in workers:
            worker.close()


def _load(
    model: ServeModel, settings: Settings, ours: WorkerProcess, stock: WorkerProcess
) -> dict[str, messages.Loaded]:
    """Start both engines, at the same time: nothing is measured yet."""
    command = messages.Load(
        model=str(model.path),
        load_format=model.load_format,
        dtype=_DTYPES[settings.element],
        eager=settings.eager,
        max_model_len=max(c + settings.max_tokens(c) for c in settings.contexts),
        max_num_seqs=settings.batch,
        max_num_batched_tokens=STEP_TOKENS,
        kv_cache_bytes=_cache_bytes(model, settings),
    )
    stock.send(command)
    int8 = settings.kv_cache_settings()
    if int8:
        command = replace(command, kv_cache_dtype=INT8_DTYPE, additional_config={"kv_cache": int8})
    ours.send(command)
    loaded = {worker.spec.name: worker.receive(messages.Loaded) for worker in (ours, stock)}
    for worker in (ours, stock):
        _check_engine(worker, loaded[worker.spec.name], settings.threads)
    return loaded


def _check_engine(worker: WorkerProcess, loaded: messages.Loaded, threads: int) -> None:
    """Refuse to measure something else than the table will say."""
    if loaded.platform.partition(".")[0] != worker.spec.platform_of:
        raise BenchError(
            f"the engine of {worker.spec.name} runs on {loaded.platform}. Run ascend-plugin doctor."
        )
    if loaded.threads != threads:
        raise BenchError(
            f"the engine of {worker.spec.name} uses {loaded.threads} threads instead of {threads}. "
            "Unset OpenMP variables (OMP_*, KMP_*, GOMP_*) and the CPU affinity."
        )


def _warm_up(model: ServeModel, ours: WorkerProcess, stock: WorkerProcess) -> None:
    prompts = [[3] * min(16, model.vocabulary - 1)]
    for worker in (ours, stock):
        worker.ask(messages.Prefill(prompts, 8), messages.Prefilled)
        worker.ask(messages.Decode(2), messages.Decoded)
        worker.ask(messages.Finish(), messages.Finished)


def _run_case(
    model: ServeModel,
    context: int,
    settings: Settings,
    ours: WorkerProcess,
    stock: WorkerProcess,
    label: str,
    report: Report,
) -> ServeRow:
    prompts = random_prompts(model.vocabulary, settings.batch, context)
    prefill = messages.Prefill(prompts, settings.max_tokens(context))
    first: dict[str, list[float]] = {}
    for worker in (stock, ours):
        report(f"{label}: prefill of {worker.spec.name}")
        first[worker.spec.name] = worker.ask(prefill, messages.Prefilled).first_token_s
    seconds: dict[str, list[float]] = {ours.spec.name: [], stock.spec.name: []}
    for number in range(settings.rounds):
        report(f"{label}: decode round {number + 1} of {settings.rounds}")
        for worker in (ours, stock) if number % 2 else (stock, ours):
            answer = worker.ask(messages.Decode(settings.new_tokens), messages.Decoded)
            seconds[worker.spec.name].append(answer.seconds)
    measured = [
        _Measured(
            first[worker.spec.name],
            tuple(seconds[worker.spec.name]),
            worker.ask(messages.Finish(), messages.Finished).tokens,
        )
        for worker in (ours, stock)
    ]
    return _row(model, context, settings, *measured)


def random_prompts(vocabulary: int, batch: int, length: int) -> list[list[int]]:
    """Return prompts of random token ids, always the same ones."""
    generator = random.Random(0)
    return [[generator.randrange(2, vocabulary) for _ in range(length)] for _ in range(batch)]


def _row(
    model: ServeModel, context: int, settings: Settings, ours: _Measured, stock: _Measured
) -> ServeRow:
    tokens = settings.batch * settings.new_tokens
    ttft, stock_ttft = statistics.median(ours.first_token_s), statistics.median(stock.first_token_s)
    equal, compared = equal_prefix(ours.tokens, stock.tokens)
    note = None
    if 2 * equal < compared and quantisation_of(settings.variant) is None:
        note = "greedy tokens part early: check parity with bench attention"
    return ServeRow(
        model=model.name,
        variant=settings.variant,
        batch=settings.batch,
        context=context,
        new_tokens=settings.new_tokens,
        rounds=settings.rounds,
        threads=settings.threads,
        decode_tok_s=_digits(tokens / statistics.median(ours.round_s)),
        stock_decode_tok_s=_digits(tokens / statistics.median(stock.round_s)),
        ratio_vs_stock=_digits(
            statistics.median(s / o for s, o in zip(stock.round_s, ours.round_s, strict=True))
        ),
        ttft_ms=_digits(ttft * 1e3),
        stock_ttft_ms=_digits(stock_ttft * 1e3),
        ttft_ratio_vs_stock=_digits(stock_ttft / ttft),
        tokens_equal_prefix=equal,
        tokens_compared=compared,
        note=note,
    )


def equal_prefix(ours: Sequence[Sequence[int]], stock: Sequence[Sequence[int]]) -> tuple[int, int]:
    """Return how many tokens agree before the first difference of each request, and of how many."""
    equal = compared = 0
    for mine, theirs in zip(ours, stock, strict=True):
        length = min(len(mine), len(theirs))
        compared += length
        equal += next((i for i in range(length) if mine[i] != theirs[i]), length)
    return equal, compared


def _cache_bytes(model: ServeModel, settings: Settings) -> int:
    """Return the cache that holds every request to its end, with some blocks to spare."""
    longest = max(context + settings.max_tokens(context) for context in settings.contexts)
    blocks = settings.batch * (-(-longest // _BLOCK) + 1) + 8
    return blocks * _BLOCK * model.token_bytes(settings.element)


def _require_fit(model: ServeModel, settings: Settings) -> None:
    """Refuse contexts that the model does not have, and two engines that memory does not hold."""
    for context in settings.contexts:
        longest = context + settings.max_tokens(context)
        if longest > model.max_positions:
            raise BenchError(
                f"--context {context} with {longest - context} new tokens exceeds the "
                f"{model.max_positions} positions of {model.name}. Lower --context, --new-tokens "
                "or --rounds."
            )
    each = model.weight_bytes(settings.element) + _cache_bytes(model, settings) + _PROCESS_BYTES
    available = machine.available_memory()
    if available is not None and 2 * each > available:
        raise BenchError(
            f"two engines of {model.name} need about {2 * each / 2**30:.1f} GiB of memory and "
            f"{available / 2**30:.1f} GiB are available. Lower --batch or --context, or choose a "
            "smaller --model."
        )


def method(settings: Settings, outcome: Outcome) -> dict[str, object]:
    """Return how it was measured, for ``meta``."""
    return {
        "interleaving": "both engines stay alive, one computes at a time; decode rounds A B, B A",
        "decode_tok_s": "median over rounds; every step serves all requests",
        "ttft_ms": "median over requests submitted at once; one prefill of each engine",
        "ratio_vs_stock": "median over rounds of stock time / our time",
        "eager": settings.eager,
        "kv_cache": settings.kv_cache_settings() or "not quantised",
        "prefix_caching": False,
        "max_num_batched_tokens": STEP_TOKENS,
        "environment": {
            name: value
            for name, value in worker_environment(OURS, settings.threads, {}).items()
            if name != "VLLM_PLUGINS"
        },
        "VLLM_PLUGINS": {spec.name: spec.plugins for spec in (OURS, STOCK)},
        "engines": {
            model: {name: asdict(loaded) for name, loaded in engines.items()}
            for model, engines in outcome.engines.items()
        },
    }


def _digits(value: float) -> float:
    """Round to four significant digits: more would be noise."""
    return float(f"{value:.4g}")
