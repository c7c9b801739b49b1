"""The texts that a draft layer learns from: the base model's own answers, and its continuations.

Everything is drawn with fixed seeds and appended to a file batch by batch, so that an interrupted
run goes on and a repeated one gives the same.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from ascend_plugin.mtp import prompts as prompts_
from ascend_plugin.mtp.errors import MTPError
from ascend_plugin.mtp.process import Worker

#: Called with what is being done, how much of it is done, and the total.
Progress = Callable[[str, int, int], None]
Kind = Literal["chat", "prose"]

#: Requests in one line to the worker: enough to fill the engine, few enough to lose.
_BATCH = 192
_SEQUENCES = 96
#: A question is one line; what runs longer is cut.
_QUESTION_TOKENS = 48
#: Beginnings per wanted question at most: some complete to the same, or to nothing of use.
_STARTS_PER_QUESTION = 3


@dataclass(frozen=True, slots=True)
class SamplePlan:
    """What is to be sampled.

    Attributes:
        answers: completions, of chat and prose prompts together.
        held_out: completions kept for validation, always greedy.
        max_tokens: of a completion.
        prose: share of prompts that are beginnings of paragraphs.
        greedy: share of completions that are greedy; others are drawn.
        temperature: of those.
        seed: of prompts and draws.
    """

    answers: int = 2400
    held_out: int = 200
    max_tokens: int = 224
    prose: float = 0.35
    greedy: float = 0.6
    temperature: float = 0.7
    seed: int = 0

    def count(self, kind: Kind) -> int:
        """Return how many completions of a kind are wanted, held-out ones included."""
        return self._share(kind, self.answers) + self.held_out_of(kind)

    def held_out_of(self, kind: Kind) -> int:
        """Return how many of them are held out."""
        return self._share(kind, self.held_out)

    def _share(self, kind: Kind, total: int) -> int:
        prose = round(total * self.prose)
        return prose if kind == "prose" else total - prose


@dataclass(frozen=True, slots=True)
class Sample:
    """A prompt and what the base model made of it.

    Attributes:
        kind: where the prompt is from.
        held_out: whether it is for validation only.
        prompt, completion: token ids.
    """

    kind: Kind
    held_out: bool
    prompt: list[int]
    completion: list[int]


@dataclass(frozen=True, slots=True)
class _Request:
    held_out: bool
    prompt: list[int]
    temperature: float
    seed: int


#: Completes requests: of so many tokens at most, ending at one of the given ids.
_Ask = Callable[[Sequence[_Request], int, Sequence[int]], list[list[int]]]


class LineFile:
    """JSON objects on disk, one per line; a line that was cut off is not one."""

    def __init__(self, path: Path) -> None:
        """Name the file."""
        self.path = path

    def read(self) -> list[dict[str, Any]]:
        """Return the objects."""
        if not self.path.exists():
            return []
        lines = self.path.read_text(encoding="utf-8").splitlines(keepends=True)
        return [json.loads(line) for line in lines if line.endswith("\n")]

    def append(self, objects: Iterable[Mapping[str, Any]]) -> None:
        """Add lines."""
        with self.path.open("a", encoding="utf-8") as file:
            file.write("".join(json.dumps(item) + "\n" for item in objects))

    def repair(self) -> None:
        """Remove what an interruption left of a line."""
        if self.path.exists():
            staged = self.path.with_suffix(".new")
            staged.unlink(missing_ok=True)
            LineFile(staged).append(self.read())
            staged.replace(self.path)


def sample(
    model: Path,
    tokenizer: Any,
    texts: Sequence[str],
    kind: Kind,
    plan: SamplePlan,
    folder: Path,
    threads: int,
    report: Progress,
) -> list[Sample]:
    """Sample until the plan is fulfilled for one kind; what is in ``folder`` stays.

    Args:
        model: folder of the base model.
        tokenizer: of transformers; with a chat template for chat.
        texts: prose whose paragraphs are continued.
        kind: of prompts.
        plan: how much of what.
        folder: where samples and questions are kept.
        threads: of the engine.
        report: told of progress.

    Returns:
        Held-out samples first.

    Raises:
        MTPError: the engine cannot serve the model, or there are too few prompts.
    """
    file = LineFile(folder / f"samples-{kind}.jsonl")
    file.repair()
    done = file.read()
    if len(done) < plan.count(kind):
        report("starting vLLM", 0, 1)
        with Worker("sample_worker", threads, _settings(model)) as worker:
            ask = _asker(worker)
            prompts = _prompts(tokenizer, texts, kind, plan, folder, ask, report)
            requests = _requests(tokenizer, prompts, kind, plan)
            for start in range(len(done), len(requests), _BATCH):
                report(f"{kind} samples", start, len(requests))
                batch = requests[start : start + _BATCH]
                tokens = ask(batch, plan.max_tokens, _stop_ids(tokenizer))
                file.append(
                    asdict(Sample(kind, request.held_out, request.prompt, completion))
                    for request, completion in zip(batch, tokens, strict=True)
                )
        done = file.read()
    return [Sample(**line) for line in done[: plan.count(kind)]]


def _prompts(
    tokenizer: Any,
    texts: Sequence[str],
    kind: Kind,
    plan: SamplePlan,
    folder: Path,
    ask: _Ask,
    report: Progress,
) -> list[str]:
    count = plan.count(kind)
    if kind == "prose":
        found = prompts_.openings(texts, count, plan.seed)
        if len(found) < count:
            raise MTPError(
                f"--data has {len(found)} paragraphs long enough to continue; {count} are wanted. "
                "Give more text, or lower --answers or --prose."
            )
        return found
    frame = prompts_.chat_frame(tokenizer)
    if frame is None:
        raise MTPError(
            "the tokenizer has no chat template, so nothing can be asked. Use --prose 1."
        )
    asked = _questions(tokenizer, frame, count, plan.seed, folder, ask, report)
    if len(asked) < count:
        raise MTPError(
            f"the model wrote {len(asked)} different questions; {count} are wanted. Lower "
            "--answers."
        )
    return [frame[0] + question + frame[1] for question in asked[:count]]


def _requests(
    tokenizer: Any, prompts: Sequence[str], kind: Kind, plan: SamplePlan
) -> list[_Request]:
    """Return requests, held-out ones first and all greedy."""
    draw = random.Random(f"{plan.seed} {kind}")
    held_out = plan.held_out_of(kind)
    return [
        _Request(
            i < held_out,
            tokenizer(text, add_special_tokens=kind == "prose")["input_ids"],
            0.0 if i < held_out or draw.random() < plan.greedy else plan.temperature,
            plan.seed * 1_000_003 + i,
        )
        for i, text in enumerate(prompts)
    ]


def _questions(
    tokenizer: Any,
    frame: tuple[str, str],
    count: int,
    seed: int,
    folder: Path,
    ask: _Ask,
    report: Progress,
) -> list[str]:
    """Let the model write user's turns until there are enough different ones."""
    file = LineFile(folder / "questions.jsonl")
    file.repair()
    found = dict.fromkeys(line["question"] for line in file.read())
    drawn = max((line["drawn"] for line in file.read()), default=0)
    limit = _STARTS_PER_QUESTION * count
    while len(found) < count and drawn < limit:
        report("questions", len(found), count)
        starts = prompts_.question_starts(frame, _BATCH, seed + drawn)
        batch = [
            _Request(False, tokenizer(text, add_special_tokens=False)["input_ids"], 1.0, seed + i)
            for i, text in enumerate(starts, start=drawn)
        ]
        tokens = ask(batch, _QUESTION_TOKENS, _stop_ids(tokenizer))
        texts = tokenizer.batch_decode(tokens, skip_special_tokens=True)
        drawn += len(batch)
        new = [text for text in prompts_.questions(frame, starts, texts) if text not in found]
        file.append({"question": text, "drawn": drawn} for text in new)
        found |= dict.fromkeys(new)
    return list(found)


def _stop_ids(tokenizer: Any) -> list[int]:
    return [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]


def _asker(worker: Worker) -> _Ask:
    """Return what completes requests on a worker's engine."""

    def ask(batch: Sequence[_Request], max_tokens: int, stop: Sequence[int]) -> list[list[int]]:
        answer: list[list[int]] = worker.ask(
            {
                "prompts": [request.prompt for request in batch],
                "temperatures": [request.temperature for request in batch],
                "seeds": [request.seed for request in batch],
                "max_tokens": max_tokens,
                "stop_token_ids": list(stop),
            }
        )
        return answer

    return ask


def _settings(model: Path) -> dict[str, Any]:
    return {
        "model": str(model),
        "max_model_len": 1024,
        "max_num_seqs": _SEQUENCES,
        "kv_cache_memory_bytes": 3 << 30,
        "skip_tokenizer_init": True,
    }
