"""Element types by their names in options. No import of torch: bad values are refused at once."""

from __future__ import annotations

from typing import Literal, TypeVar, get_args

from ascend_plugin.bench.errors import BenchError

Element = Literal["bf16", "fp16", "fp32"]
ELEMENTS: tuple[Element, ...] = get_args(Element)
#: Bytes of an element.
ITEMSIZE: dict[Element, int] = {"bf16": 2, "fp16": 2, "fp32": 4}

NameT = TypeVar("NameT", bound=str)


def known(option: str, value: str, allowed: tuple[NameT, ...]) -> NameT:
    """Return the allowed name that equals ``value``.

    Raises:
        BenchError: there is none; the message names ``option`` and what is allowed.
    """
    for name in allowed:
        if value == name:
            return name
    raise BenchError(f"{option} {value} is unknown; use {', '.join(allowed)}.")
