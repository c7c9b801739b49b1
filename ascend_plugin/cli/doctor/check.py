"""One row of the doctor."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Status = Literal["ok", "warning", "problem"]


@dataclass(frozen=True, slots=True)
class Check:
    """What one check found.

    Attributes:
        name: what was checked.
        status: ``problem`` when serving fails or is wrong, ``warning`` when it is slower or not
            what the user may expect.
        detail: what was found.
        remedy: what to do; empty when nothing.
    """

    name: str
    status: Status
    detail: str
    remedy: str = ""


def ok(name: str, detail: str) -> Check:
    """Return a row without remedy."""
    return Check(name, "ok", detail)
