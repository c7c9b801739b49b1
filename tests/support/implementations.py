"""Every implementation of the operators that a test must run on."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from ascend_plugin.ops import dispatch
from ascend_plugin.ops.native import loader

ISAS = ("avx512", "avx2", "portable")
IMPLEMENTATIONS = ("reference", *(f"native-{isa}" for isa in ISAS))


def why_not(name: str) -> str | None:
    """Return why this machine cannot run an implementation; None: it can.

    A library that is not built, or does not load, is no reason to skip: its tests fail.
    """
    policy, _, isa = name.partition("-")
    if policy == "reference" or isa == "portable":
        return None
    missing = not torch.cpu._is_avx512_supported() if isa == "avx512" else not _has_avx2()
    return f"this processor has no {isa}" if missing else None


def _has_avx2() -> bool:
    return torch.cpu._is_avx2_supported()


@contextmanager
def forced(name: str) -> Iterator[None]:
    """Make one implementation, and of the native ones one library, serve every call."""
    policy, _, isa = name.partition("-")
    if isa:
        os.environ[loader.ISA_VARIABLE] = isa
    dispatch.set_policy(policy)
    try:
        yield
    finally:
        dispatch.set_policy("auto")
        os.environ.pop(loader.ISA_VARIABLE, None)


@contextmanager
def threads(count: int) -> Iterator[None]:
    """Let the operators use so many threads; tests use one, for the machine is shared."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
