"""Logging: the plugin speaks through vLLM's handlers, format and level."""

from __future__ import annotations

import logging


def share_vllm_handlers() -> None:
    """Give the plugin's loggers vLLM's handlers and level. Idempotent."""
    theirs = logging.getLogger("vllm")
    ours = logging.getLogger("ascend_plugin")
    if theirs.handlers:
        ours.handlers = list(theirs.handlers)
        ours.propagate = False
    ours.setLevel(theirs.level)
