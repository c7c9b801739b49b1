"""The choice of the number of drafts, on engines of given costs and acceptance."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import pytest

from ascend_plugin.spec_decode.policy import Acceptance, Costs, DraftPolicy, Step


@dataclass
class Engine:
    """Steps that take ``base * (1 + per_draft * drafts)``, half of it to verify, half to make them.

    Attributes:
        most: drafts of a step at most.
        per_draft: cost of a draft, for a batch of so many.
        accepts: probability that a draft is right, after so many tokens.
        noise: of measured times, relative; they only ever look longer.
        base: seconds of a step without drafts, after so many tokens.
    """

    most: int
    per_draft: Callable[[int], float]
    accepts: Callable[[float], float]
    noise: float = 0.0
    base: Callable[[float], float] = lambda tokens: 0.03
    seed: int = 0
    made: Counter[int] = field(default_factory=Counter)

    def run(self, tokens: int, batch: Callable[[float], int] = lambda tokens: 1) -> float:
        """Return how many times as fast as without drafts so many tokens per request come."""
        draw, policy = random.Random(self.seed), DraftPolicy(self.most)
        verified, done, took, without = 0, 0.0, 0.0, 0.0
        while done < tokens:
            size = batch(done)
            drafted = policy.choose(size)
            base, each = self.base(done), self.per_draft(size)
            seconds = base * (1 + each * (verified + drafted) / 2)
            right = [self._right(draw, verified, self.accepts(done)) for _ in range(size)]
            accepted = tuple(sum(n > i for n in right) for i in range(verified))
            seen = seconds * (1 + abs(draw.gauss(0, self.noise)))
            step = Step(size, verified, drafted, seen, accepted)
            policy.observe(step)
            took, without = took + seconds, without + base * step.tokens
            done += step.tokens
            self.made[drafted] += 1
            verified = drafted
        return without / took

    @staticmethod
    def _right(draw: random.Random, verified: int, chance: float) -> int:
        count = 0
        while count < verified and draw.random() < chance:
            count += 1
        return count

    def best(self, batch: int = 1) -> float:
        """Return the speed-up of the best fixed number of drafts."""
        chance = self.accepts(0)
        tokens = [sum(chance**i for i in range(k + 1)) for k in range(self.most + 1)]
        return max(n / (1 + self.per_draft(batch) * k) for k, n in enumerate(tokens))


@pytest.mark.parametrize("noise", [0.0, 0.1])
@pytest.mark.parametrize("chance", [0.0, 0.2, 0.4, 0.6, 0.8])
@pytest.mark.parametrize("per_draft", [0.05, 0.27, 0.67])
def test_never_much_slower_and_nearly_as_fast_as_the_best(
    per_draft: float, chance: float, noise: float
) -> None:
    for batch, seed in ((1, 0), (1, 1), (1, 2), (8, 3)):
        engine = Engine(3, lambda _: per_draft, lambda _: chance, noise, seed=seed)
        found = engine.run(1500, lambda _, size=batch: size)
        assert found >= 0.97
        assert found >= 0.88 * engine.best(batch)


@pytest.mark.parametrize("most", [1, 2, 5, 15])
def test_proposals_of_any_length(most: int) -> None:
    assert Engine(most, lambda _: 0.3, lambda _: 0.1).run(1500) >= 0.97
    good = Engine(most, lambda _: 0.1, lambda _: 0.9)
    assert good.run(3000) >= 0.85 * good.best()


def test_it_comes_back_when_drafts_become_good() -> None:
    """Bad for 600 tokens, good for 1400: almost all of the gain is taken."""
    engine = Engine(3, lambda _: 0.27, lambda tokens: 0.0 if tokens < 600 else 0.8, 0.05)
    bad, good = 600, 1400 / Engine(3, lambda _: 0.27, lambda _: 0.8).best()
    assert engine.run(2000) >= 0.8 * 2000 / (bad + good)


@pytest.mark.parametrize("period", [30, 100, 300])
def test_acceptance_that_flips(period: int) -> None:
    """Each change comes when the policy has just learnt the opposite."""
    for seed in range(3):
        flips = Engine(3, lambda _: 0.27, lambda t: 0.8 * ((t // period) % 2), 0.05, seed=seed)
        assert flips.run(3000) >= 0.97


@pytest.mark.parametrize("chance", [0.0, 0.8])
def test_times_that_change_for_other_reasons(chance: float) -> None:
    """Contexts grow and are cut; steps become twice as long and fast again."""
    for base in (lambda t: 0.03 * (1 + t / 2000), lambda t: 0.03 * (1 + (t % 200) / 200)):
        engine = Engine(3, lambda _: 0.27, lambda _: chance, 0.05, base)
        assert engine.run(2000) >= (0.97 if chance == 0 else 1.35)


@pytest.mark.parametrize("chance", [0.0, 0.5])
@pytest.mark.parametrize("stay", [7, 40, 100])
def test_batches_that_come_and_go(stay: int, chance: float) -> None:
    """What pays for one request does not for twelve: costs are known by size."""
    for per_row in (0.03, 0.1):
        engine = Engine(3, lambda size, row=per_row: 0.15 + row * size, lambda _: chance, 0.05)
        assert engine.run(3000, lambda t: 1 + int(t / stay) % 12) >= 0.97


def test_hopeless_drafts_are_hardly_tried() -> None:
    engine = Engine(3, lambda _: 1.5, lambda _: 1.0)
    assert engine.run(3000) >= 0.99
    assert engine.made[0] > 0.99 * engine.made.total()


def test_the_same_steps_give_the_same_choices() -> None:
    made = [Engine(3, lambda _: 0.2, lambda _: 0.5, 0.1, seed=7) for _ in range(2)]
    assert made[0].run(800) == made[1].run(800)
    assert made[0].made == made[1].made


def test_acceptance_by_place() -> None:
    acceptance = Acceptance(2)
    assert acceptance.expected(1) == 0.5, "nothing is known"
    for _ in range(400):
        acceptance.observe(Step(4, 2, 2, 1.0, (3, 1)))
    assert acceptance.expected(1) == pytest.approx(0.75, abs=0.01)
    assert acceptance.expected(2) == pytest.approx(0.75 + 0.25, abs=0.02)
    assert acceptance.expected(2, hope=0.9) == pytest.approx(0.9 + 0.81)
    for _ in range(400):
        acceptance.observe(Step(4, 0, 0, 1.0, ()))
    assert acceptance.expected(1) == pytest.approx(0.75, abs=0.01), "nothing was learnt"


def costs(*runs: tuple[int, Sequence[float]]) -> Costs:
    found = Costs()
    for drafts, times in runs:
        for seconds in times:
            found.observe(drafts, seconds)
    found.settle()
    return found


def test_costs_are_learnt_where_the_number_changes() -> None:
    one = costs((0, [1.0] * 6), (1, [1.5] * 4))
    assert one.of(1) == pytest.approx(1.5)
    assert one.of(3) == pytest.approx(2.5), "on a line with what is known"
    # A level that rises while the number stays is no cost.
    slow = costs((0, [1.0] * 6), (1, [1.5] * 60 + [3.0] * 60), (0, [2.0] * 5), (1, [3.0] * 4))
    assert slow.of(1) == pytest.approx(1.5, rel=0.02)
    assert costs((0, [1.0, 1.0, 9.0, 1.0, 1.0]), (1, [2.0, 2.0, 40.0, 2.0])).of(1) == 2.0
    assert Costs().of(1) is None


def test_after_a_break_only_the_level_is_new() -> None:
    found = costs((0, [1.0] * 6), (1, [1.5] * 8))
    found.interrupt()
    for _ in range(6):
        found.observe(1, 3.0)
    assert found.of(1) == pytest.approx(1.5)
    assert found.level == pytest.approx(0.693, abs=0.01)
