"""How a module of a scheme runs on a device: decided here, logged and shown by ``inspect``."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from .scheme import ModuleScheme, Scheme, Source


class Kernel(StrEnum):
    """What multiplies."""

    FLOAT = "vLLM's float GEMM"
    WEIGHT_ONLY = "weight_quant_matmul"
    INT8_EXACT = "quant_matmul"
    INT8_ONEDNN = "vLLM's oneDNN int8"


@dataclass(frozen=True, slots=True)
class Plan:
    """How one module runs.

    Attributes:
        kernel: what multiplies.
        runs_as: the scheme that results, for example ``W4A16``.
        note: why it differs from the checkpoint's scheme; empty: it does not.
    """

    kernel: Kernel
    runs_as: str
    note: str = ""


def plan(module: ModuleScheme) -> Plan:
    """Say how a module runs on a CPU.

    Args:
        module: of a checkpoint.
    """
    if module.scheme is Scheme.FLOAT:
        return Plan(Kernel.FLOAT, "FLOAT")
    if module.scheme in (Scheme.W4A16, Scheme.W8A16):
        return Plan(Kernel.WEIGHT_ONLY, module.scheme.value)
    if module.scheme is Scheme.W4A8:
        return Plan(
            Kernel.WEIGHT_ONLY,
            "W4A16",
            "inputs stay 16-bit: a CPU gains nothing from quantising them beside 4-bit weights",
        )
    if module.group != module.k or not module.symmetric:
        what = "groups" if module.group != module.k else "zero points"
        return Plan(Kernel.WEIGHT_ONLY, "W8A16", f"inputs stay 16-bit: 8-bit weights with {what}")
    if module.scheme is Scheme.W8A8_DYNAMIC:
        return Plan(Kernel.INT8_ONEDNN, Scheme.W8A8_DYNAMIC.value)
    if module.source is Source.MODELSLIM:
        return Plan(Kernel.INT8_EXACT, Scheme.W8A8.value)
    return Plan(Kernel.INT8_ONEDNN, Scheme.W8A8.value)
