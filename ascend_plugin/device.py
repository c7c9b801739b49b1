"""Is there an NPU, and if not, why? Asked once per process, before vLLM is imported."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
import sys
from dataclasses import dataclass
from typing import Literal

#: Kill switch: ``cpu`` ignores NPUs of this machine. Needed because vLLM chooses the platform
#: before it reads any option.
DEVICE_VARIABLE = "ASCEND_PLUGIN_DEVICE"


@dataclass(frozen=True, slots=True)
class DetectedDevice:
    """What runs here.

    Attributes:
        kind: ``npu`` when torch_npu works and sees a device.
        reason: one sentence that explains ``kind``.
        broken: torch_npu is installed but does not work: worth a warning, not a silent fallback.
    """

    kind: Literal["npu", "cpu"]
    reason: str
    broken: bool = False


@functools.cache
def detect_device() -> DetectedDevice:
    """Return the device of this process; torch_npu is imported only if it is installed."""
    if os.environ.get(DEVICE_VARIABLE, "").lower() == "cpu":
        _hide_torch_npu()
        return DetectedDevice("cpu", f"{DEVICE_VARIABLE}=cpu is set")
    if importlib.util.find_spec("torch_npu") is None:
        return DetectedDevice("cpu", "torch_npu is not installed")
    try:
        torch_npu = importlib.import_module("torch_npu")
    except Exception as error:  # a broken install fails in many ways: ImportError, OSError, …
        _hide_torch_npu()
        return DetectedDevice("cpu", f"torch_npu does not import: {_sentence(error)}", broken=True)
    try:
        count = int(torch_npu.npu.device_count())
    except Exception as error:
        reason = f"torch_npu cannot count NPUs: {_sentence(error)}"
        return DetectedDevice("cpu", reason, broken=True)
    if count < 1:
        reason = "torch_npu sees no NPU (check npu-smi info and ASCEND_RT_VISIBLE_DEVICES)"
        return DetectedDevice("cpu", reason, broken=True)
    return DetectedDevice("npu", f"torch_npu sees {count} NPU(s)")


def _hide_torch_npu() -> None:
    """Make ``import torch_npu`` fail cleanly from now on, unless it has succeeded before.

    Transformers imports every torch_npu that it finds, unguarded, and vLLM imports transformers: a
    broken one would stop the CPU from serving, too.
    """
    if sys.modules.get("torch_npu") is None:
        sys.modules["torch_npu"] = None  # type: ignore[assignment]


def _sentence(error: BaseException) -> str:
    """Return type and first line of an error."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else 'no message'}"
