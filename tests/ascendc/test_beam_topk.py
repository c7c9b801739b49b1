"""The kernel ``beam_topk`` on the host model: equal to the operator under every schedule."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch

from ascend_plugin.ops.ascendc import host
from ascend_plugin.ops.beam_topk import TopK, beam_topk, quantise_logits

ENTRIES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}
MODES = ["quantised", *ENTRIES.values()]

#: How far the kernel's log-softmax may be from the operator's, which computes in float64: relative
#: to the larger of 1 and its magnitude.
LOG_BOUND = 2.0**-20


@dataclass(frozen=True, slots=True)
class Case:
    """A launch: its shape, and what the logits look like."""

    rows: int
    vocab: int
    k: int
    cores: int
    logits: str = "normal"
    extra: int = 0  # columns between the rows

    def draw(self, dtype: torch.dtype) -> torch.Tensor:
        """Logits ``[rows, vocab]``, ``extra`` columns apart, which hold what must not be read."""
        generator = torch.Generator().manual_seed(self.vocab)
        values = KINDS[self.logits]((self.rows, self.vocab), generator).to(dtype)
        apart = torch.full((self.rows, self.vocab + self.extra), 1e4, dtype=dtype)
        apart[:, : self.vocab] = values
        return apart[:, : self.vocab]


def _normal(shape: tuple[int, int], generator: torch.Generator) -> torch.Tensor:
    return torch.randn(shape, generator=generator) * 4


def _equal(shape: tuple[int, int], generator: torch.Generator) -> torch.Tensor:
    return torch.full(shape, 2.5)


def _ties(shape: tuple[int, int], generator: torch.Generator) -> torch.Tensor:
    return torch.randint(-3, 4, shape, generator=generator).float()


def _flat(shape: tuple[int, int], generator: torch.Generator) -> torch.Tensor:
    """All codes are 126 or 127: nearly every token is a candidate."""
    return 100 + torch.rand(shape, generator=generator)


def _masked(shape: tuple[int, int], generator: torch.Generator) -> torch.Tensor:
    """A grammar leaves a few tokens: fewer than k of them in some rows."""
    values = torch.full(shape, -torch.inf)
    allowed = torch.randint(shape[1], (shape[0], 4), generator=generator)
    return values.scatter(1, allowed, torch.randn(allowed.shape, generator=generator))


def _ascending(shape: tuple[int, int], generator: torch.Generator) -> torch.Tensor:
    """The best stand at the very end."""
    return torch.arange(shape[0] * shape[1]).view(shape) / 64.0


def _last(shape: tuple[int, int], generator: torch.Generator) -> torch.Tensor:
    """The best token ends the vocabulary, in a group that has nothing else to offer."""
    values = -torch.arange(shape[0] * shape[1]).view(shape) / 64.0
    values[:, -1] = 9.0
    return values


KINDS: dict[str, Callable[[tuple[int, int], torch.Generator], torch.Tensor]] = {
    "normal": _normal,
    "equal": _equal,
    "ties": _ties,
    "flat": _flat,
    "masked": _masked,
    "ascending": _ascending,
    "last": _last,
}

#: Small enough for every mutant: several rows on a core, several cores on a row, three tiles, whole
#: tiles, an end inside a group with the best token there, more marked groups than a batch holds.
QUICK = [
    Case(rows=3, vocab=300, k=5, cores=2, logits="ascending", extra=7),
    Case(rows=1, vocab=32740, k=4, cores=2, logits="last"),
    Case(rows=2, vocab=3001, k=16, cores=9, logits="flat"),
    Case(rows=1, vocab=37000, k=8, cores=1, logits="ties"),
]
SHAPES = [
    Case(rows=1, vocab=1, k=1, cores=4),
    Case(rows=2, vocab=16, k=16, cores=3, logits="ties"),
    Case(rows=1, vocab=127, k=3, cores=1, logits="ascending"),
    Case(rows=5, vocab=128, k=2, cores=48, logits="masked"),
    Case(rows=1, vocab=129, k=16, cores=2, logits="equal", extra=1),
    Case(rows=4, vocab=2500, k=7, cores=3, logits="masked"),
    Case(rows=2, vocab=16385, k=16, cores=2, logits="ascending", extra=31),
    Case(rows=1, vocab=9000, k=16, cores=48, logits="equal"),
    Case(rows=9, vocab=4097, k=4, cores=48, logits="flat", extra=3),
    Case(rows=8, vocab=151936, k=16, cores=40),
    Case(rows=1, vocab=262144, k=16, cores=1),
]


def _whole(rows: torch.Tensor | None) -> torch.Tensor | None:
    """The memory that rows are a view of."""
    return None if rows is None else rows._base


def _launch(
    case: Case,
    mode: str,
    schedule: host.Schedule,
    codes: torch.Tensor,
    scales: torch.Tensor,
    logits: torch.Tensor | None,
) -> TopK:
    """Run the kernel once over poisoned memory."""
    shape = (case.rows, case.k)
    found = TopK(
        torch.full(shape, -1, dtype=torch.int32),
        torch.full(shape, torch.nan),
        torch.full(shape, torch.nan),
    )
    workspace = torch.full((case.rows * 2048,), torch.nan)
    entry = "beam_topk_quantised" if mode == "quantised" else f"beam_topk_exact_{mode}"
    strides = [codes.stride(0), logits.stride(0) if logits is not None else 0]
    numbers = [case.rows, case.vocab, case.k, *strides]
    host.library("beam_topk").launch(
        entry,
        case.cores,
        [_whole(codes), scales, _whole(logits), *found, workspace, *numbers],
        schedule=schedule,
        strict=True,
    )
    return found


def _check(case: Case, mode: str, schedules: list[host.Schedule]) -> None:
    dtype = {name: dtype for dtype, name in ENTRIES.items()}.get(mode, torch.float32)
    logits = case.draw(dtype)
    codes, scales = quantise_logits(logits)
    apart = torch.full((case.rows, case.vocab + case.extra), 127, dtype=torch.int8)
    apart[:, : case.vocab] = codes
    codes = apart[:, : case.vocab]
    rescored = None if mode == "quantised" else logits
    expected = beam_topk(codes, scales, case.k, rescored)
    for schedule in schedules:
        found = _launch(case, mode, schedule, codes, scales, rescored)
        assert torch.equal(found.indices, expected.indices), schedule
        assert torch.equal(found.scores, expected.scores), schedule
        difference = (found.log_probs.double() - expected.log_probs.double()).abs()
        assert bool((difference <= LOG_BOUND * expected.log_probs.abs().clamp(min=1)).all())


@pytest.mark.parametrize("mode", ["quantised", "bf16", "fp32"])
@pytest.mark.parametrize("case", QUICK, ids=str)
def test_quick(case: Case, mode: str) -> None:
    _check(case, mode, host.schedules())


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("case", SHAPES, ids=str)
def test_shapes(case: Case, mode: str) -> None:
    _check(case, mode, host.schedules())
