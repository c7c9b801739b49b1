"""The training loop: resumable, with validation on held-out answers and early stopping."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from ascend_plugin.mtp.base import BaseModel
from ascend_plugin.mtp.batches import Batch, epoch
from ascend_plugin.mtp.errors import MTPError
from ascend_plugin.mtp.hidden import Reading
from ascend_plugin.mtp.layer import Keys, MTPLayer, shift
from ascend_plugin.mtp.objective import Head, choose_head, cross_entropy
from ascend_plugin.mtp.sampling import Progress
from ascend_plugin.spec_decode.token_order import DEFAULT_TOKENS


@dataclass(frozen=True, slots=True)
class TrainPlan:
    """How to train.

    Attributes:
        minutes: of training, validation included; over all runs that continue each other.
        epochs: passes over the data at most.
        batch_tokens: tokens of a step.
        passes: drafts in a row that are learnt in the end, while rates fall. Until then only the
            first is: each later one costs as much time again, and is learnt soon.
        head_tokens: tokens of the vocabulary that take part (``objective.Head``).
        matrix_rate: learning rate of matrices (Muon).
        vector_rate: of norms and biases (AdamW).
        decay: share of the time at the end in which rates fall to nothing.
        noise: on the base's hidden states, relative to their size: against learning by heart.
        regression: weight of the squared distance to the base's next normed hidden state.
        check_steps: steps between validations.
        patience: validations without a new best after which training ends.
        seed: of the order and the noise.
        start: SHA-256 of the file of the layer to begin with; none: begins as the base's last one.
    """

    minutes: float = 60.0
    epochs: int = 20
    batch_tokens: int = 4096
    passes: int = 2
    head_tokens: int = DEFAULT_TOKENS
    matrix_rate: float = 2e-3
    vector_rate: float = 1e-3
    decay: float = 0.4
    noise: float = 0.05
    regression: float = 1.0
    check_steps: int = 50
    patience: int = 8
    seed: int = 0
    start: str | None = None

    def left(self, seconds: float) -> float:
        """Return the share of the time that is left after so many seconds."""
        return 1 - seconds / (self.minutes * 60)


@dataclass(frozen=True, slots=True)
class Point:
    """One validation.

    Attributes:
        step, seconds, tokens: of training so far; tokens are those learnt from, with repetitions.
        loss: mean cross entropy since the last validation.
        acceptance: share of held-out first, second, ... drafts that are right, given that those
            before them are.
    """

    step: int
    seconds: float
    tokens: int
    loss: float
    acceptance: list[float]


@dataclass(slots=True)
class Course:
    """How training went so far."""

    step: int = 0
    epoch: int = 0
    batch: int = 0
    seconds: float = 0.0
    tokens: int = 0
    points: list[Point] = field(default_factory=list)

    def best(self) -> Point | None:
        """Return the validation with the highest acceptance of first drafts."""
        return max(self.points, key=lambda point: point.acceptance[0], default=None)

    def stale(self) -> int:
        """Return how many validations there were since the best."""
        best = self.best()
        return 0 if best is None else len(self.points) - 1 - self.points.index(best)


class Trainer:
    """A layer, its optimisers and data."""

    def __init__(
        self,
        base: BaseModel,
        readings: Sequence[Reading],
        held_out: Sequence[Reading],
        plan: TrainPlan,
        folder: Path,
        start: Mapping[str, torch.Tensor] | None = None,
    ) -> None:
        """Prepare, and go on from what an earlier run left in ``folder``.

        Args:
            base: stays as it is.
            readings: to learn from.
            held_out: to validate with.
            plan: how.
            folder: where the state of training is kept.
            start: parameters of ``MTPLayer`` to begin with; none: those of the base's last layer.

        Raises:
            MTPError: there is nothing to learn from, or what is in the folder is of another plan.
        """
        if not readings or not held_out:
            raise MTPError(
                f"there are {len(readings)} sequences to learn from and {len(held_out)} to check "
                "with; both must be at least 1. Give more --answers, --held-out or --data."
            )
        self.base, self.plan = base, plan
        self._readings, self._held_out = readings, held_out
        self.layer = MTPLayer(base.shape)
        if start is None:
            self.layer.start_from(base)
        else:
            self.layer.load_state_dict(dict(start))
        self.layer.to(base.device)
        self.head: Head = choose_head(base.head, readings, plan.head_tokens)
        self._scale = float(base.norm.float().pow(2).mean())
        self._optimisers = _optimisers(self.layer, plan)
        self._path = folder / "training.pt"
        self.best_weights = self._weights()
        self.course = Course()
        self._restore()

    def run(self, report: Progress) -> Course:
        """Train until time, epochs or patience end; ``best_weights`` are those to keep."""
        course = self.course
        started = time.monotonic() - course.seconds
        losses: list[float] = []
        while not self._done():
            groups = list(epoch(self._readings, self.plan.batch_tokens, self._seed(course.epoch)))
            for group in groups[course.batch :]:
                self._set_rates()
                losses.append(self._step(Batch.of(group)))
                course.batch += 1
                course.step += 1
                course.seconds = time.monotonic() - started
                if course.step % self.plan.check_steps == 0 or self._done():
                    self._check(losses, report)
                    course.seconds = time.monotonic() - started
                if self._done():
                    return course
            course.epoch, course.batch = course.epoch + 1, 0
        if losses:
            self._check(losses, report)
        return course

    def _seed(self, number: int) -> int:
        return self.plan.seed * 1_000_003 + number

    def _done(self) -> bool:
        plan, course = self.plan, self.course
        return (
            course.seconds >= plan.minutes * 60
            or course.epoch >= plan.epochs
            or course.stale() >= plan.patience
        )

    def _set_rates(self) -> None:
        """Warm up, hold, then fall linearly over the last part of the time."""
        plan = self.plan
        left = plan.left(self.course.seconds)
        share = min(1.0, (self.course.step + 1) / 20) * max(0.02, min(1.0, left / plan.decay))
        for optimiser, rate in zip(
            self._optimisers, (plan.matrix_rate, plan.vector_rate), strict=True
        ):
            for group in optimiser.param_groups:
                group["lr"] = rate * share

    def _passes(self) -> int:
        plan = self.plan
        return plan.passes if plan.left(self.course.seconds) <= plan.decay else 1

    def _step(self, batch: Batch) -> float:
        """Learn from one batch; return the loss of first drafts."""
        hidden = batch.hidden.to(self.base.device).float()
        size = hidden.pow(2).mean(-1, keepdim=True).sqrt()
        generator = torch.Generator(hidden.device).manual_seed(self._seed(self.course.step))
        noise = torch.randn(hidden.shape, generator=generator, device=hidden.device)
        hidden = hidden + self.plan.noise * size * noise
        embedding = self.base.embedding[batch.next_ids.to(self.base.device)].float()
        with torch.no_grad():
            wanted = torch.nn.functional.rms_norm(
                batch.next_hidden.to(self.base.device).float(),
                (hidden.shape[-1],),
                self.base.norm.float(),
                self.base.shape.eps,
            )
        passes: list[Keys] = []
        rope = self.base.rope(hidden.shape[1])
        losses, total = [], hidden.new_zeros(())
        for i in range(self._passes()):
            with torch.autocast(self.base.device.type, torch.bfloat16):
                output = self.layer(hidden, embedding, rope, passes)
            used = batch.used.clone()
            used[:, :i] = False
            chosen = output[used.to(output.device)].float()
            loss = cross_entropy(chosen, self.head, batch.top_ids[used], batch.top_logprobs[used])
            distance = (chosen - wanted[used.to(output.device)]).pow(2).mean() / self._scale
            total = total + loss + self.plan.regression * distance
            losses.append(float(loss.detach()))
            hidden = shift(output.float())
        total.backward()
        torch.nn.utils.clip_grad_norm_(self.layer.parameters(), 1.0)
        for optimiser in self._optimisers:
            optimiser.step()
            optimiser.zero_grad()
        self.course.tokens += int(batch.used.sum())
        return losses[0]

    def _check(self, losses: list[float], report: Progress) -> None:
        """Validate, keep the best, and save; ``losses`` are those since the last time."""
        course = self.course
        loss = sum(losses) / len(losses)
        losses.clear()
        rates = acceptance(self.layer, self.base, self._held_out)
        best = course.best()
        course.points.append(
            Point(course.step, round(course.seconds, 1), course.tokens, round(loss, 4), rates)
        )
        if best is None or rates[0] > best.acceptance[0]:
            self.best_weights = self._weights()
        state = {
            "plan": asdict(self.plan),
            "course": asdict(course),
            "layer": self.layer.state_dict(),
            "best": self.best_weights,
            "optimisers": [optimiser.state_dict() for optimiser in self._optimisers],
        }
        staged = self._path.with_suffix(".new")
        torch.save(state, staged)
        staged.replace(self._path)
        text = ", ".join(f"{rate:.3f}" for rate in rates)
        report(
            f"step {course.step}, loss {loss:.3f}, held-out drafts accepted {text}",
            round(course.seconds),
            round(self.plan.minutes * 60),
        )

    def _weights(self) -> dict[str, torch.Tensor]:
        return {
            name: weight.detach().to("cpu", torch.bfloat16, copy=True)
            for name, weight in self.layer.state_dict().items()
        }

    def _restore(self) -> None:
        if not self._path.exists():
            return
        state: dict[str, Any] = torch.load(self._path, weights_only=True)
        # More time or more patience continues the same training; anything else would be another.
        free = {"minutes", "epochs", "patience"}
        plan = asdict(self.plan)
        differing = sorted(
            name for name in plan if name not in free and state["plan"].get(name) != plan[name]
        )
        if differing:
            raise MTPError(
                f"{self._path} is of a training that differs in {', '.join(differing)}. Repeat the "
                "command as it was, or start anew with --restart."
            )
        points = [Point(**point) for point in state["course"].pop("points")]
        self.course = Course(**state["course"], points=points)
        self.layer.load_state_dict(state["layer"])
        self.best_weights = state["best"]
        for optimiser, kept in zip(self._optimisers, state["optimisers"], strict=True):
            optimiser.load_state_dict(kept)


def _optimisers(layer: MTPLayer, plan: TrainPlan) -> list[torch.optim.Optimizer]:
    matrices = [p for p in layer.parameters() if p.dim() == 2]
    vectors = [p for p in layer.parameters() if p.dim() == 1]
    return [
        torch.optim.Muon(
            matrices, lr=plan.matrix_rate, weight_decay=0.01, adjust_lr_fn="match_rms_adamw"
        ),
        torch.optim.AdamW(vectors, lr=plan.vector_rate, betas=(0.9, 0.95), weight_decay=0.0),
    ]


@torch.no_grad()
def acceptance(
    layer: MTPLayer,
    base: BaseModel,
    readings: Sequence[Reading],
    drafts: int = 3,
    batch_tokens: int = 8192,
) -> list[float]:
    """Return how often greedy drafts are the base's greedy choice, on texts that it wrote greedily.

    Chains of drafts begin at every position; as an accepted draft is the text's own token, the
    text can stand in for the drafts.

    Args:
        layer: to check.
        base: whose projection to logits, the whole vocabulary of it, is used.
        readings: held-out answers.
        drafts: in a row.
        batch_tokens: tokens at once.

    Returns:
        For each place in a chain the share that is right among those whose predecessors are; 0
        where none got so far.
    """
    reached, right = [0] * drafts, [0] * drafts
    for group in epoch(readings, batch_tokens, 0):
        batch = Batch.of(group)
        hidden = batch.hidden.to(base.device)
        embedding = base.embedding[batch.next_ids.to(base.device)]
        rope, passes = base.rope(hidden.shape[1]), list[Keys]()
        alive = batch.used.to(base.device)
        for i in range(drafts):
            with torch.autocast(base.device.type, torch.bfloat16):
                output = layer(hidden.float(), embedding.float(), rope, passes)
            choice = torch.full_like(batch.next_ids, -1).to(base.device)
            choice[alive] = (output[alive].bfloat16() @ base.head.T).argmax(-1)
            hit = alive & (choice == batch.top_ids[..., 0].to(base.device))
            reached[i] += int(alive.sum())
            right[i] += int(hit.sum())
            # The chain goes on at the next position, if that has a token to check with.
            alive = torch.cat([torch.zeros_like(hit[:, :1]), hit[:, :-1]], 1)
            alive &= batch.used.to(base.device)
            hidden = shift(output)
    return [round(r / n, 4) if n else 0.0 for r, n in zip(right, reached, strict=True)]


def save_curve(path: Path, course: Course) -> None:
    """Write the course of training as JSON."""
    path.write_text(json.dumps(asdict(course), indent=1) + "\n", encoding="utf-8")
