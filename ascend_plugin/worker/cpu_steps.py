"""Decode steps of vLLM's CPU runner, recorded and repeated.

vLLM keeps the inputs of a step at fixed addresses: token ids, positions, slots, lengths and block
tables are rows of buffers that live as long as the runner. A step is recorded once for each set of
addresses and shapes, which are few: one per number of tokens and requests.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Hashable, Iterable
from typing import TYPE_CHECKING, Any

import torch

from ascend_plugin.graph.cpu import NotRecordable, Pool, RecordedStep, record_step
from ascend_plugin.ops.native import support

if TYPE_CHECKING:
    from vllm.config import VllmConfig

logger = logging.getLogger(__name__)

#: Tokens of a step that is recorded at most: beyond, kernels take longer than what is between them,
#: and the dense ones are not made for as many rows.
MAX_TOKENS = 32
#: Recorded steps of a runner at most. More means that addresses change from step to step.
MAX_STEPS = MAX_TOKENS * (MAX_TOKENS + 1) // 2


def refusal(vllm_config: VllmConfig) -> str | None:
    """Return why decode steps of an engine are not recorded; None: they are."""
    from vllm.config import CompilationMode

    model, parallel = vllm_config.model_config, vllm_config.parallel_config
    native = support()
    reasons = {
        "--enforce-eager asks for none": model.enforce_eager,
        "torch.compile is asked for": vllm_config.compilation_config.mode != CompilationMode.NONE,
        "adapters (LoRA) change from step to step": vllm_config.lora_config is not None,
        "KV caches are moved layer by layer": vllm_config.kv_transfer_config is not None,
        "the model is spread over processes": parallel.world_size > 1,
        "the model embeds or classifies": model.runner_type != "generate",
        f"there are no native kernels: {native.reason}": not native.ok,
    }
    return next((reason for reason, holds in reasons.items() if holds), None)


class RecordedSteps:
    """Stands for a model's forward pass: repeats steps that were recorded, records others.

    Attributes:
        name: of the steps in the log.
        recorded: steps recorded.
        repeated: how often one of them ran again.
        given_up: why no more steps are recorded; None: they are.
    """

    def __init__(self, forward: Callable[..., Any], pool: Pool, name: str = "Decode") -> None:
        """Stand before ``forward``, with its arguments.

        Args:
            forward: runs a model on keyword arguments, within vLLM's forward context.
            pool: shared by all that run in turn.
            name: of the steps in the log.
        """
        self._forward = forward
        self._pool = pool
        self.name = name
        self._steps: dict[Hashable, RecordedStep] = {}
        self.recorded = 0
        self.repeated = 0
        self.given_up: str | None = None

    def forget(self) -> None:
        """Forget all steps, because weights or caches have moved."""
        self._steps.clear()

    def __call__(self, *positional: Any, **arguments: Any) -> Any:
        """Run the model on one step's inputs; within vLLM's forward context."""
        if positional:  # proposers that are no language model
            return self._forward(*positional, **arguments)
        key = None if self.given_up else _key(arguments)
        if key is None:
            return self._forward(**arguments)
        step = self._steps.get(key)
        if step is not None:
            self.repeated += 1
            return step.repeat()
        return self._record(key, arguments)

    def _record(self, key: Hashable, arguments: dict[str, Any]) -> Any:
        if len(self._steps) >= MAX_STEPS:
            return self._give_up(f"more than {MAX_STEPS} kinds of steps", arguments)
        try:
            step = record_step(lambda: self._forward(**arguments), self._pool, _inlined())
        except NotRecordable as reason:
            return self._give_up(str(reason), arguments)
        self._steps[key] = step
        self.recorded += 1
        if self.recorded == 1:
            logger.info(
                "%s steps of up to %d tokens are recorded and repeated as native calls; the first "
                "has %d. --enforce-eager switches this off.",
                self.name,
                MAX_TOKENS,
                len(step.program.steps),
            )
        return step.output

    def _give_up(self, reason: str, arguments: dict[str, Any]) -> Any:
        self.given_up = reason
        logger.info("%s steps run operator by operator: %s.", self.name, reason)
        return self._forward(**arguments)


def _key(arguments: dict[str, Any]) -> Hashable | None:
    """Return the addresses and shapes that a step depends on; None: it is not to be recorded."""
    from vllm.forward_context import get_forward_context

    ids = arguments.get("input_ids")
    if ids is None or ids.shape[0] > MAX_TOKENS:
        return None
    parts: list[Hashable] = []
    for name, value in arguments.items():
        if value is None or isinstance(value, int):
            parts.append((name, value))
        elif isinstance(value, torch.Tensor):
            parts.append((name, *_address(value)))
        else:
            return None
    context = get_forward_context()
    metadata, slots = context.attn_metadata, context.slot_mapping
    if not isinstance(metadata, dict) or not isinstance(slots, dict):
        return None
    for batch in _distinct(metadata.values()):
        if not hasattr(batch, "addresses"):
            return None
        parts.append(batch.addresses())
    parts.extend(_address(each) for each in _distinct(slots.values()))
    return tuple(parts)


def _address(tensor: torch.Tensor) -> tuple[Hashable, ...]:
    return tensor.data_ptr(), tensor.shape, tensor.stride()


def _distinct(values: Iterable[Any]) -> Iterable[Any]:
    return {id(value): value for value in values}.values()


def _inlined() -> dict[str, Callable[..., Any]]:
    """Return vLLM's operators that only look up a layer and call the plugin's attention."""
    from vllm.model_executor.layers.attention import attention

    return {
        "vllm::unified_kv_cache_update": attention.unified_kv_cache_update,
        "vllm::unified_attention_with_output": attention.unified_attention_with_output,
    }
