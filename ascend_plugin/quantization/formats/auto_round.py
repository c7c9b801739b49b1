"""What auto-round writes into ``quantization_config`` beside the formats that it packs into."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, Literal

_METHODS = ("auto-round", "auto_round", "intel/auto-round")
_SPECIAL = set(r"*+?^$()[]{}|\\")


def is_auto_round(config: Mapping[str, Any]) -> bool:
    """Say whether auto-round wrote a ``quantization_config`` in its own form, of integers."""
    return (
        config.get("quant_method") in _METHODS
        and config.get("data_type", "int") == "int"
        and config.get("act_bits", 16) in (None, 16)
    )


def packing(config: Mapping[str, Any]) -> str:
    """Return the format that the tensors are packed into."""
    return str(config.get("packing_format") or "auto_round:auto_gptq")


def layer_override(
    config: Mapping[str, Any], module: str
) -> Mapping[str, Any] | Literal[False] | None:
    """Return what is said of one module alone; False: it stays float; None: nothing."""
    extra = config.get("extra_config") or {}
    found = extra.get(module)
    if found is None:
        for pattern, values in extra.items():
            if _SPECIAL & set(pattern) and re.search(pattern, module):
                found = values
                break
    if found is None:
        return None
    if int(found.get("bits", 4)) >= 16:
        return False
    return {key: found[key] for key in ("bits", "group_size", "sym") if key in found}
