"""What every bench of operators asks of torch: dtypes, threads, the choice of kernels."""

from __future__ import annotations

import os

import torch

from ascend_plugin.bench.elements import Element
from ascend_plugin.bench.errors import BenchError
from ascend_plugin.bench.settings import Settings
from ascend_plugin.ops import dispatch
from ascend_plugin.ops.native import loader

DTYPES: dict[Element, torch.dtype] = {
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "fp32": torch.float32,
}


def apply_settings(settings: Settings) -> None:
    """Set threads, implementation and instruction set for this process."""
    torch.set_num_threads(settings.threads)
    torch.manual_seed(0)
    implementation = "native" if settings.isa else settings.implementation
    forced = os.environ.get(dispatch.POLICY_VARIABLE)
    if implementation and forced not in (None, implementation):
        raise BenchError(
            f"{dispatch.POLICY_VARIABLE}={forced} is set and wins over --implementation "
            f"{implementation}. Unset it."
        )
    if implementation:
        dispatch.set_policy(implementation)
    if settings.isa:
        os.environ[loader.ISA_VARIABLE] = settings.isa
    if implementation == "native":
        loader.load()  # says at once why it cannot
