"""What a draft layer is worth in vLLM: how many drafts are accepted, and how much faster it is."""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ascend_plugin.mtp.checkpoint import read_config
from ascend_plugin.mtp.errors import MTPError
from ascend_plugin.mtp.process import Worker
from ascend_plugin.mtp.sampling import Progress

#: Requests at once where only acceptance is counted.
_TOGETHER = 16
_SIZES = (1, 8)


@dataclass(frozen=True, slots=True)
class EvalRequest:
    """What is to be evaluated; names as in the options of ``mtp eval``.

    Attributes:
        model: folder of a checkpoint with an MTP layer.
        prompts: token ids.
        stop: ids that end a text.
        drafts: of a proposal.
        tokens: to generate per prompt at most.
        speed_prompts: of the prompts, how many are timed one by one; larger batches take as many
            groups, as far as there are prompts. 0: none.
        rounds: interleaved runs of each.
        dtype: what the model computes in.
        threads: of torch, in each engine.
    """

    model: Path
    prompts: list[list[int]]
    stop: list[int]
    drafts: int
    tokens: int
    speed_prompts: int
    rounds: int
    dtype: str
    threads: int


@dataclass(frozen=True, slots=True)
class EvalResult:
    """What was found.

    Attributes:
        acceptance: share of proposals whose first, second, ... draft was accepted.
        acceptance_first: the first of these.
        mean_accepted_length: tokens per verified proposal, the model's own included.
        proposals: verified.
        different: prompts whose text differs from that without speculation: near-ties.
        decode: tokens per second by batch size, median of the rounds: with, without.
        speedup_b1, speedup_b8: median over rounds of the ratio; None: not timed.
        speculation: how the timed engine drafted, by default; see ``spec_decode.prepare.describe``.
    """

    acceptance: list[float]
    acceptance_first: float
    mean_accepted_length: float
    proposals: int
    different: int
    decode: dict[str, list[float]]
    speedup_b1: float | None
    speedup_b8: float | None
    speculation: dict[str, Any]


def read_prompts(path: Path) -> list[list[int]]:
    """Return the prompts of a file that ``mtp train`` wrote.

    Raises:
        MTPError: it is missing, empty or of another form.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
        prompts = [json.loads(line)["prompt"] for line in lines if line.strip()]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise MTPError(
            f"--prompts {path} cannot be read ({error}). Give a file of JSON lines with token ids "
            "under \"prompt\", such as the prompts.jsonl that 'mtp train' writes."
        ) from error
    if not prompts:
        raise MTPError(f"--prompts {path} is empty.")
    return prompts


def check_model(model: Path) -> None:
    """Refuse a checkpoint without a draft layer.

    Raises:
        MTPError: there is none.
    """
    if not read_config(model).get("num_nextn_predict_layers"):
        raise MTPError(
            f"{model} has no MTP layer. Train one with 'ascend-plugin mtp train {model} ...', or "
            "join it with one that exists: 'ascend-plugin mtp attach'."
        )


def evaluate(request: EvalRequest, report: Progress) -> EvalResult:
    """Count accepted drafts, then time engines with and without drafts, which take turns.

    Drafts are counted where every step makes them, which tells about the layer; the engine that is
    timed drafts as it does by default.

    Raises:
        MTPError: an engine ended.
    """
    check_model(request.model)
    speculation = {"method": "mtp", "num_speculative_tokens": request.drafts}
    all_prompts = _batch(request, request.prompts, _TOGETHER)
    report("with drafts in every step, all prompts", 0, 1)
    with Worker("eval_worker", request.threads, _settings(request, speculation, False)) as always:
        found = always.ask(all_prompts)
    report("starting vLLM twice", 0, 1)
    with (
        Worker("eval_worker", request.threads, _settings(request, None)) as without,
        Worker("eval_worker", request.threads, _settings(request, speculation)) as with_,
    ):
        report("without drafts, all prompts", 0, 1)
        plain = without.ask(all_prompts)
        different = sum(a != b for a, b in zip(found["tokens"], plain["tokens"], strict=True))
        speeds = _race(request, with_, without, report)
        described = with_.ask(_batch(request, request.prompts[:1], 1))["speculation"]
    counters = found["counters"]
    proposals = int(counters["drafts"])
    if not proposals:
        raise MTPError("no draft was verified: the answers are too short. Give more --tokens.")
    acceptance = [
        round(counters[f"accepted_tokens_per_pos_{i}"] / proposals, 4)
        for i in range(request.drafts)
    ]
    ratios = {size: [a / b for a, b in rounds] for size, rounds in speeds.items()}
    medians = {size: round(statistics.median(values), 3) for size, values in ratios.items()}
    return EvalResult(
        acceptance,
        acceptance[0],
        round(1 + counters["accepted_tokens"] / proposals, 3),
        proposals,
        different,
        {str(size): _medians(rounds) for size, rounds in speeds.items()},
        medians.get(1),
        medians.get(8),
        described,
    )


def _settings(
    request: EvalRequest, speculation: dict[str, Any] | None, adaptive: bool | None = None
) -> dict[str, Any]:
    """Return arguments of an engine; ``adaptive`` None: as it is by default."""
    more: dict[str, Any] = {"speculative_config": speculation} if speculation else {}
    if adaptive is not None:
        more["additional_config"] = {"speculation": {"adaptive": adaptive}}
    longest = max(len(prompt) for prompt in request.prompts)
    return {
        "model": str(request.model),
        "dtype": request.dtype,
        "max_model_len": longest + request.tokens + request.drafts + 1,
        "max_num_seqs": _TOGETHER,
        "kv_cache_memory_bytes": 1 << 30,
        # Every round must do the same work.
        "enable_prefix_caching": False,
        "skip_tokenizer_init": True,
        "disable_log_stats": False,
        "seed": 0,
    } | more


def _batch(request: EvalRequest, prompts: Sequence[list[int]], size: int) -> dict[str, Any]:
    return {
        "prompts": list(prompts),
        "size": size,
        "max_tokens": request.tokens,
        "stop_token_ids": request.stop,
    }


def _race(
    request: EvalRequest, with_: Worker, without: Worker, report: Progress
) -> dict[int, list[tuple[float, float]]]:
    """Return tokens per second with and without drafts, of each round, by batch size."""
    found: dict[int, list[tuple[float, float]]] = {}
    for size in _SIZES:
        # Steps of a full batch are timed, so a group ends with its first request: one group says
        # more about the choice of drafts at its beginning than about the choice that lasts.
        groups = min(request.speed_prompts, len(request.prompts) // size)
        if not groups:
            continue
        whole = _spread(request.prompts, groups * size)
        for i in range(request.rounds):
            report(f"speed at batch {size}", i, request.rounds)
            pair = [_speed(worker, _batch(request, whole, size)) for worker in (with_, without)]
            found.setdefault(size, []).append((pair[0], pair[1]))
    return found


def _spread(prompts: Sequence[list[int]], count: int) -> list[list[int]]:
    """Return ``count`` of the prompts, evenly spread: the file may have them by kind."""
    return [prompts[i * len(prompts) // count] for i in range(count)]


def _speed(worker: Worker, batch: dict[str, Any]) -> float:
    answer = worker.ask(batch)
    if not answer["seconds"]:
        raise MTPError("the answers are too short to be timed. Give more --tokens.")
    return float(answer["decoded"] / answer["seconds"])


def _medians(rounds: Sequence[tuple[float, float]]) -> list[float]:
    return [round(statistics.median(column), 1) for column in zip(*rounds, strict=True)]
