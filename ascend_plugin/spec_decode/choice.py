"""The policy at work in an engine: steps are timed and counted, and what it decides is told."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from .metrics import DraftGauges
from .policy import DraftPolicy, Step

if TYPE_CHECKING:
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.outputs import ModelRunnerOutput

logger = logging.getLogger(__name__)

#: Seconds between two lines of the log at least.
_QUIET = 30.0


class DraftChoice:
    """Answers how many drafts a step of so many requests makes; vLLM asks like a list.

    Args:
        most: drafts of a step at most.
        limits: the same by number of requests, as ``num_speculative_tokens_per_batch_size`` says;
            None: always ``most``.
        model: name under which the model is served.
        clock: seconds.
    """

    def __init__(
        self,
        most: int,
        limits: Sequence[int] | None,
        model: str,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        """Know nothing yet."""
        self.policy = DraftPolicy(most)
        self._limits, self._clock = limits, clock
        self._gauges = DraftGauges(model, most)
        self._started = self._ended = 0.0
        self._made = 0
        self._open: tuple[int, int, int, tuple[int, ...]] | None = None
        self._verifying = 0
        self._told: tuple[int, float] | None = None

    def begin(self) -> None:
        """Say that a step begins; the one before has ended."""
        if self._open is not None:
            batch, verified, drafted, accepted = self._open
            seconds = self._ended - self._started
            self.policy.observe(Step(batch, verified, drafted, seconds, accepted))
            self._tell(batch)
        self._open = None
        self._verifying, self._made = self._made, 0
        self._started = self._clock()

    def __getitem__(self, batch: int) -> int:
        """Return how many drafts the step makes for each of its ``batch`` requests."""
        limit = self.policy.most if self._limits is None else self._limits[batch]
        self._made = min(limit, self.policy.choose(batch))
        return self._made

    def end(self, scheduled: SchedulerOutput, output: ModelRunnerOutput) -> None:
        """Count what a step accepted, if every request in it decoded."""
        self._ended = self._clock()
        if not scheduled.num_scheduled_tokens:
            return
        self._gauges.count(self._made)
        drafts = scheduled.scheduled_spec_decode_tokens
        lengths = {name: len(drafts.get(name, ())) for name in scheduled.num_scheduled_tokens}
        decoding = all(
            count == 1 + lengths[name] for name, count in scheduled.num_scheduled_tokens.items()
        )
        # Drafts that a grammar forbids are not verified: fewer than were made, never more.
        if not decoding or max(lengths.values()) > self._verifying:
            return
        right = [
            len(output.sampled_token_ids[output.req_id_to_index[name]]) - 1 for name in lengths
        ]
        accepted = tuple(sum(n > i for n in right) for i in range(self._verifying))
        self._open = (len(lengths), self._verifying, self._made, accepted)

    def drafted(self) -> None:
        """Say that the drafts of the step are there: on a device, that was waited for."""
        self._ended = self._clock()

    def _tell(self, batch: int) -> None:
        """Export what is chosen, and log a change that lasts."""
        chosen = self.policy.settled(batch)
        speedup = self.policy.worth(batch, chosen) or 1.0
        self._gauges.set(chosen, speedup)
        told, now = self._told, self._clock()
        if told is not None and (told[0] == chosen or now - told[1] < _QUIET):
            return
        self._told = (chosen, now)
        logger.info(
            "Steps make %d of %d drafts (batch %d): %.2f are expected to be accepted, and decoding "
            "to be %.2f times as fast as without.",
            chosen,
            self.policy.most,
            batch,
            self.policy.acceptance.expected(chosen),
            speedup,
        )
