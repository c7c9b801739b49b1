"""``mtp train`` from files to a layer, a checkpoint and a plot."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING

from ascend_plugin.kv_eval.text import text_digest
from ascend_plugin.mtp.base import BaseModel, check_base, read_config
from ascend_plugin.mtp.checkpoint import attach, load_layer_of, save_layer
from ascend_plugin.mtp.errors import MTPError
from ascend_plugin.mtp.hidden import HiddenCache, Reading, text_samples
from ascend_plugin.mtp.layer import PREFIX
from ascend_plugin.mtp.sampling import Kind, Progress, Sample, SamplePlan, sample
from ascend_plugin.mtp.train import Course, Trainer, TrainPlan, save_curve

if TYPE_CHECKING:
    import torch

#: Tokens of a piece of given text.
_PIECE = 384
LAYER = "layer.safetensors"


@dataclass(frozen=True, slots=True)
class TrainRequest:
    """What is to be trained; names as in the options of ``mtp train``.

    Attributes:
        model: folder of the base.
        texts: prose, at least one.
        output: folder of results.
        work: folder of samples, hidden states and the state of training.
        text_tokens: tokens of the given prose to learn from as well.
        samples, training: plans.
        start: file of a layer of this base to begin with.
        threads: of sampling.
        device: of the base and the training: ``cpu`` or another of torch's.
    """

    model: Path
    texts: list[str]
    output: Path
    work: Path
    text_tokens: int = 100_000
    samples: SamplePlan = field(default_factory=SamplePlan)
    training: TrainPlan = field(default_factory=TrainPlan)
    start: Path | None = None
    threads: int = 1
    device: str = "cpu"


@dataclass(frozen=True, slots=True)
class TrainResult:
    """What came of it.

    Attributes:
        layer: file of the draft layer.
        checkpoint: folder that vLLM serves.
        course: of training.
        learnt, held_out: sequences.
        coverage: share of the base's mass on the tokens that took part.
    """

    layer: Path
    checkpoint: Path
    course: Course
    learnt: int
    held_out: int
    coverage: float


def run(request: TrainRequest, report: Progress) -> TrainResult:
    """Sample, read, train and write; what an interrupted run has done is not done again.

    Raises:
        MTPError: it cannot be trained.
    """
    check_base(read_config(request.model), request.model)
    plan, start = _training(request)
    _claim(request)
    report("loading the base", 0, 1)
    base = BaseModel(request.model, request.device)
    given = _sample(base, request, report)
    learnt, held_out = _readings(base, given, request, report)
    trainer = Trainer(base, learnt, held_out, plan, request.work, start)
    course = trainer.run(report)
    best = course.best()
    if best is None:
        raise MTPError(
            f"training ended before its first validation. Give more than "
            f"--minutes {plan.minutes:g}."
        )
    request.output.mkdir(parents=True, exist_ok=True)
    layer = request.output / LAYER
    about = _about(base, request, plan, course)
    save_layer(layer, trainer.best_weights, trainer.head.order, about)
    save_curve(request.output / "curve.json", course)
    write_prompts(request.output / "prompts.jsonl", [s for s in given if s.held_out])
    checkpoint = attach(request.model, layer, request.output / "checkpoint")
    coverage = round(trainer.head.coverage, 4)
    return TrainResult(layer, checkpoint, course, len(learnt), len(held_out), coverage)


def _sample(base: BaseModel, request: TrainRequest, report: Progress) -> list[Sample]:
    """Return all samples, and pieces of the given texts."""
    kinds: list[Kind] = ["prose"]
    plan = request.samples
    if getattr(base.tokenizer, "chat_template", None) and plan.prose < 1:
        kinds.insert(0, "chat")
    found: list[Sample] = []
    for kind in kinds:
        if plan.count(kind):
            found += sample(
                request.model,
                base.tokenizer,
                request.texts,
                kind,
                plan,
                request.work,
                request.threads,
                report,
            )
    ids = [
        base.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        for text in request.texts
    ]
    return found + text_samples(ids, _PIECE, request.text_tokens // _PIECE)


def _training(request: TrainRequest) -> tuple[TrainPlan, dict[str, torch.Tensor] | None]:
    """Return the plan, and the parameters to begin with if it is to begin with a layer."""
    if request.start is None:
        return request.training, None
    weights, _ = load_layer_of(request.model, request.start)
    digest = hashlib.sha256(request.start.read_bytes()).hexdigest()
    named = {name.removeprefix(PREFIX): weight for name, weight in weights.items()}
    return replace(request.training, start=digest), named


def _readings(
    base: BaseModel, given: Sequence[Sample], request: TrainRequest, report: Progress
) -> tuple[list[Reading], list[Reading]]:
    """Return what the base says of the samples to learn from, and of those held out."""

    def read(name: str, part: Sequence[Sample]) -> list[Reading]:
        cache = HiddenCache(request.work / "hidden", name)
        cache.fill(base, part, report)
        return cache.load()

    learnt = read("learnt", [item for item in given if not item.held_out])
    held_out = read("held-out", [item for item in given if item.held_out])
    return learnt, held_out


def _claim(request: TrainRequest) -> None:
    """Refuse a folder of work that belongs to another model, text or plan of samples."""
    request.work.mkdir(parents=True, exist_ok=True)
    mark = request.work / "plan.json"
    plan = {
        "model": str(request.model.resolve()),
        "text_sha256": text_digest(request.texts),
        "text_tokens": request.text_tokens,
        "samples": asdict(request.samples),
    }
    if not mark.exists():
        mark.write_text(json.dumps(plan, indent=1) + "\n", encoding="utf-8")
        return
    kept = json.loads(mark.read_text(encoding="utf-8"))
    differing = sorted(name for name in plan if kept.get(name) != plan[name])
    if differing:
        raise MTPError(
            f"{request.work} holds the work of another training: it differs in "
            f"{', '.join(differing)}. Repeat the command as it was, name another --work, or start "
            "anew with --restart."
        )


def _about(
    base: BaseModel, request: TrainRequest, plan: TrainPlan, course: Course
) -> dict[str, str]:
    """Return what a layer's file says of its making."""
    best = course.best()
    assert best is not None
    return {
        "base": base.fingerprint,
        "model": request.model.resolve().name,
        "acceptance": json.dumps(best.acceptance),
        "tokens": str(best.tokens),
        "seconds": str(round(best.seconds)),
        "samples": json.dumps(asdict(request.samples)),
        "training": json.dumps(asdict(plan)),
        "text_sha256": text_digest(request.texts),
        "ascend_plugin": metadata.version("ascend-plugin"),
    }


def write_prompts(path: Path, samples: Sequence[Sample]) -> None:
    """Write the prompts of samples, one JSON object per line, for ``mtp eval``."""
    lines = [json.dumps({"kind": item.kind, "prompt": item.prompt}) for item in samples]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
