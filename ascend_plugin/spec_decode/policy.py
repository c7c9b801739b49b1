"""How many drafts the next step makes, from running acceptance and the times of steps.

With k drafts a step gives ``1 + E(k)`` tokens of a request, where ``E(k)`` is the sum over
i = 1..k of the probability that the first i drafts are right, and takes ``c(k)`` times as long as a
step without drafts. Worth is their quotient; the policy takes the k with the most.

Costs are learnt where k changes, from the steps just before and after: what else changes in time
(contexts grow, another process runs) is the same on both sides. A change is tried for a few steps
now and then; how often follows from what a trial costs, so that all trials together stay within
:data:`TRIAL_BUDGET`. An account of time lost against decoding without drafts stops speculation when
the estimates were wrong.

Nothing here reads a clock or draws a number: the same steps give the same choices.
"""

from __future__ import annotations

import math
import statistics
from dataclasses import dataclass, field
from typing import Final

#: Share of the time that trials may cost.
TRIAL_BUDGET: Final = 0.008
#: Another number of drafts must be worth so much more.
MARGIN: Final = 1.03
#: Drafting begins where it is worth the one, and ends where it is not worth the other. Costs are
#: known to some percent; of estimates near 1 the greatest is taken, which is one that errs upwards.
BEGIN: Final = 1.06
END: Final = 1.02
#: Speculation stops when it lost this share of the time, and may come back at half of it.
MOST_LOST: Final = 0.015

_TRIAL_STEPS = 4
_SHORTEST_WAIT = 40
_LONGEST_WAIT = 2000
#: Steps after a change of k whose times say what k costs.
_ADJACENT = 5
#: Steps of other sizes after which times of a size are no more those of its last steps.
_STALE = 300
#: Weight of a step in what is known of acceptance, of the level of times, of the account.
_FORGET, _FOLLOW, _ACCOUNT = 0.015, 0.15, 0.004


@dataclass(frozen=True, slots=True)
class Step:
    """A step in which every request decoded.

    Attributes:
        batch: requests.
        verified: drafts of each request that were verified.
        drafted: drafts that were made for each.
        seconds: that it took.
        accepted: for i = 1..verified, of how many requests the first i drafts were right.
    """

    batch: int
    verified: int
    drafted: int
    seconds: float
    accepted: tuple[int, ...]

    @property
    def tokens(self) -> float:
        """Tokens that a request got, on average."""
        return 1 + sum(self.accepted) / self.batch


class Acceptance:
    """How often drafts are right, by place in a proposal; the past counts less and less."""

    def __init__(self, most: int) -> None:
        """Know nothing: as often right as wrong.

        Args:
            most: drafts of a proposal.
        """
        self._reached = [0.0] * most
        self._right = [0.0] * most

    def observe(self, step: Step) -> None:
        """Count the drafts of a step."""
        if step.verified:
            self.forget(_FORGET)
        reached = step.batch
        for i, right in enumerate(step.accepted):
            self._reached[i] += reached
            self._right[i] += right
            reached = right

    def forget(self, share: float) -> None:
        """Give what was seen less weight."""
        self._reached = [count * (1 - share) for count in self._reached]
        self._right = [count * (1 - share) for count in self._right]

    def expected(self, drafts: int, hope: float = 0.0) -> float:
        """Return how many of so many drafts will be accepted.

        Args:
            drafts: of a proposal.
            hope: least probability that a draft is given, the one before it being right.
        """
        total, all_right = 0.0, 1.0
        for right, reached in zip(self._right[:drafts], self._reached, strict=False):
            all_right *= max(hope, (right + 0.5) / (reached + 1))
            total += all_right
        return total


@dataclass(slots=True)
class Costs:
    """Times of steps of batches of about one size.

    Attributes:
        level: logarithm of the seconds of a step without drafts, as of now; None: unknown.
        excess: by number of drafts, how much longer a step takes, as a logarithm; of what was
            measured.
    """

    level: float | None = None
    excess: dict[int, float] = field(default_factory=lambda: {0: 0.0})
    _drafts: int | None = None
    _before: int | None = None
    _errors: list[float] = field(default_factory=list)

    def of(self, drafts: int) -> float | None:
        """Return how many times as long a step with drafts takes as one without; None: unknown."""
        if drafts in self.excess:
            return math.exp(self.excess[drafts])
        known = sorted(self.excess)
        if len(known) < 2:
            return None
        above = next((i for i, k in enumerate(known) if k > drafts), len(known) - 1)
        low, high = known[above - 1], known[above]
        first, second = math.exp(self.excess[low]), math.exp(self.excess[high])
        return max(1.0, first + (second - first) * (drafts - low) / (high - low))

    def interrupt(self) -> None:
        """Say that the next step does not follow the last one: the level must be found again."""
        self._drafts = self._before = None
        self._errors = []

    def observe(self, drafts: int, seconds: float) -> None:
        """Learn from a step that verified and made so many drafts."""
        value = math.log(max(seconds, 1e-9))
        if drafts != self._drafts:
            self.settle()
            self._before, self._drafts, self._errors = self._drafts, drafts, []
        if self.level is None:  # taken for one without drafts, until there is one to compare with
            self.level = value - self.excess.get(drafts, 0.0)
        error = value - self.level - self.excess.get(drafts, 0.0)
        if len(self._errors) < _ADJACENT:
            self._errors.append(error)
            if len(self._errors) == _ADJACENT:
                self._apply()
        else:
            self.level += _FOLLOW * min(0.2, max(-0.2, error))

    def settle(self) -> None:
        """Take what the steps since the last change of k say, if they are enough."""
        if 2 <= len(self._errors) < _ADJACENT:
            self._apply()
            self._errors += [0.0] * (_ADJACENT - len(self._errors))

    def _apply(self) -> None:
        """Explain how far the first steps at k are off: k's cost, the former one's, or drift."""
        assert self.level is not None
        assert self._drafts is not None
        error = statistics.median(self._errors)
        if self._before is None:
            self.level += error  # nothing to compare with
        elif self._drafts:
            known = self.excess.get(self._drafts)
            self.excess[self._drafts] = error if known is None else known + error / 2
        else:
            self.level += error  # it was inferred from steps with drafts, at their supposed cost
            self.excess[self._before] = self.excess.get(self._before, 0.0) - error


@dataclass(slots=True)
class _Size:
    """What is known and done at batches of about one size."""

    costs: Costs
    choice: int = 0
    trial: int | None = None
    trial_steps: int = 0
    waited: int = 0
    wait: int = _TRIAL_STEPS
    turn: int = 0
    seen: int = 0


class DraftPolicy:
    """Chooses the number of drafts of every step; all requests of a step get as many."""

    def __init__(self, most: int) -> None:
        """Begin without drafts, and try them at once.

        Args:
            most: drafts that a step may make, at least 1.
        """
        self.most = most
        self.acceptance = Acceptance(most)
        self._sizes: dict[int, _Size] = {}
        self._steps = 0
        #: Share of the time that was lost against decoding without drafts, lately.
        self.lost = 0.0
        self._stopped = False

    def choose(self, batch: int) -> int:
        """Return how many drafts the next step makes for each of its requests."""
        size = self._size(batch)
        return size.choice if size.trial is None else size.trial

    def settled(self, batch: int) -> int:
        """Return the same without trials."""
        return self._size(batch).choice

    def worth(self, batch: int, drafts: int) -> float | None:
        """Return how many times as fast decoding with so many drafts is; None: unknown."""
        return self._worth(self._size(batch), drafts)

    def observe(self, step: Step) -> None:
        """Learn from a step and decide anew."""
        size = self._size(step.batch)
        self._steps += 1
        if self._steps - size.seen > _STALE:
            size.costs.interrupt()
        size.seen = self._steps
        self.acceptance.observe(step)
        if step.verified == step.drafted:
            size.costs.observe(step.verified, step.seconds)
        self._book(size, step)
        if size.trial is not None:
            self._try(size, step)
        else:
            self._decide(size)

    def _size(self, batch: int) -> _Size:
        """Return the state of batches like this one: up to 1, 2, 4, 8, ... requests.

        A new size begins without drafts: what they cost there is not known.
        """
        key = (batch - 1).bit_length()
        if key not in self._sizes:
            self._sizes[key] = _Size(Costs())
        return self._sizes[key]

    def _worth(self, size: _Size, drafts: int, hope: float = 0.0) -> float | None:
        cost = size.costs.of(drafts)
        return None if cost is None else (1 + self.acceptance.expected(drafts, hope)) / cost

    def _book(self, size: _Size, step: Step) -> None:
        """Add a step to the account of time lost against decoding without drafts."""
        if size.costs.level is None:
            return
        took = step.seconds / math.exp(size.costs.level)
        lost = min(1.0, max(-1.0, took - step.tokens))
        # Time that was won long ago is no reason to lose some now.
        self.lost = max(-MOST_LOST, self.lost + _ACCOUNT * (lost - self.lost))
        if self.lost > MOST_LOST:
            self._stopped = True
        elif self.lost < MOST_LOST / 2:
            self._stopped = False

    def _begin(self, size: _Size, drafts: int) -> None:
        size.trial, size.trial_steps, size.waited = drafts, 0, 0
        if size.choice == 0:
            self.acceptance.forget(0.5)  # what is known is of long ago

    def _try(self, size: _Size, step: Step) -> None:
        """Go on with a trial, or end it."""
        # A limit by batch size may make fewer than are tried.
        size.trial_steps += step.verified == step.drafted
        if size.trial_steps < _TRIAL_STEPS:
            return
        size.costs.settle()
        tried, size.trial = size.trial, None
        assert tried is not None
        size.wait = self._next_wait(size, tried)
        self._decide(size)

    def _next_wait(self, size: _Size, drafts: int) -> int:
        """Return the steps until the next trial, from what such a trial costs."""
        cost, usual = size.costs.of(drafts), self._worth(size, size.choice)
        shortest = _SHORTEST_WAIT if self.most in size.costs.excess else _TRIAL_STEPS
        if cost is None or usual is None:
            return shortest
        lost = _TRIAL_STEPS * max(0.0, cost - (1 + self.acceptance.expected(drafts)) / usual)
        return max(shortest, min(_LONGEST_WAIT, round(lost / TRIAL_BUDGET)))

    def _decide(self, size: _Size) -> None:
        """Take the best number of drafts, or begin a trial if it is time."""
        worth = [self._worth(size, k) or 0.0 for k in range(self.most + 1)]
        best = max(range(self.most + 1), key=worth.__getitem__)
        if self._stopped or worth[best] < END:
            best = 0
        changes = worth[best] > worth[size.choice] * (MARGIN if size.choice else BEGIN)
        leaves = size.choice and (self._stopped or worth[size.choice] < END)
        if changes or leaves:
            size.choice, size.waited = best, 0
        size.waited += 1
        if size.waited > size.wait and not self._stopped:
            candidate = self._candidate(size)
            if candidate is None:
                size.waited = 0
            else:
                self._begin(size, candidate)

    def _candidate(self, size: _Size) -> int | None:
        """Return what to try; None: nothing could be worth it.

        First one draft, whose cost tells about more; then the most; later, without drafts, what
        good drafts would make best, else neighbours.
        """
        measured = size.costs.excess
        if 1 not in measured:
            return 1
        if self.most not in measured and (self._worth(size, self.most, hope=1.0) or 0.0) > BEGIN:
            return self.most
        if size.choice == 0:
            hoped = {k: self._worth(size, k, hope=0.8) or 0.0 for k in range(1, self.most + 1)}
            best = max(hoped, key=hoped.__getitem__)
            perfect = self._worth(size, best, hope=1.0) or 0.0
            return best if perfect > BEGIN else None
        neighbours = [size.choice + 1, 0, size.choice - 1]
        allowed = [k for k in neighbours if 0 <= k <= self.most]
        size.turn += 1
        return allowed[size.turn % len(allowed)]
