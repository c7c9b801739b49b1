"""vLLM's scheduler with a running choice of the number of drafts.

vLLM can make fewer drafts in large batches (``num_speculative_tokens_per_batch_size``): the
scheduler looks the number up and sends it to the workers with the step. The table is what is
replaced.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from vllm.v1.core.sched.scheduler import Scheduler

from .choice import DraftChoice

if TYPE_CHECKING:
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.engine import EngineCoreOutputs
    from vllm.v1.outputs import DraftTokenIds, ModelRunnerOutput


class AdaptiveScheduler(Scheduler):
    """Asks :class:`DraftChoice` how many drafts a step makes, and tells it how steps went."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        """Take the place of the table; arguments as in ``Scheduler``."""
        super().__init__(*args, **kwargs)
        model = self.vllm_config.model_config
        scheduler: Any = self
        name = str(model.served_model_name)
        self.choice = DraftChoice(self.num_spec_tokens, scheduler.dynamic_sd_lookup, name)
        scheduler.dynamic_sd_lookup = self.choice

    def schedule(self, *args: Any, **kwargs: Any) -> SchedulerOutput:
        """Schedule a step; arguments as in ``Scheduler``."""
        self.choice.begin()
        return super().schedule(*args, **kwargs)

    def update_from_output(
        self, scheduler_output: SchedulerOutput, model_runner_output: ModelRunnerOutput
    ) -> dict[int, EngineCoreOutputs]:
        """Take what a step gave."""
        outputs = super().update_from_output(scheduler_output, model_runner_output)
        self.choice.end(scheduler_output, model_runner_output)
        return outputs

    def update_draft_token_ids(self, draft_token_ids: DraftTokenIds) -> None:
        """Take the drafts of a step."""
        super().update_draft_token_ids(draft_token_ids)
        self.choice.drafted()
