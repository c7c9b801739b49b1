"""Quantised weights: reads what the tools write, and serves it through vLLM.

``formats`` describe a checkpoint (:class:`scheme.Checkpoint`) from its headers and configuration,
and refuse what does not fit; ``unpack`` turns its tensors into integers; ``shards`` takes a
process' part; ``plan``, ``execute`` and ``execute_npu`` choose, repack and multiply, the places
that know the device; ``runs`` joins parts; ``config``, ``linear`` and ``experts`` are vLLM's side.
"""

from __future__ import annotations

from typing import Any


def register() -> None:
    """Make ``ascend`` a quantisation method of vLLM. Idempotent."""
    from . import config  # noqa: F401  registers itself


def adopt(vllm_config: Any, device: str) -> None:
    """Give an engine that is being configured the quantisation of its checkpoint, and log it.

    Args:
        vllm_config: vLLM's configuration of the engine.
        device: ``cpu`` or ``npu``: what it will run on.

    Raises:
        CheckpointError: the checkpoint cannot be served as it is.
    """
    from . import config
    from .target import Target

    config.adopt(vllm_config, Target(device))
