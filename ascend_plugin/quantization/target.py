"""The devices that a model may run on, as plans and reports name them."""

from __future__ import annotations

from enum import StrEnum


class Target(StrEnum):
    """What a model runs on."""

    CPU = "cpu"
    NPU = "npu"
