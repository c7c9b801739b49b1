"""What a simulated NPU is like: the options of ``ascend-plugin sim run``, and how they travel.

They travel in one environment variable, so that every process that the command starts has the same
NPU. The C++ runtime reads that variable too: a flat JSON object whose values are all strings.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from .errors import SimulatorError

#: Internal: set by ``ascend-plugin sim run``, inherited by all processes below it.
OPTIONS_VARIABLE = "ASCEND_PLUGIN_SIM"

#: How streams advance. lazy: a task runs when something forces it, so a missing wait is seen;
#: eager: at the call; random: drawn from the seed.
SCHEDULES = ("lazy", "eager", "random")

_UNITS = {"": 1, "KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30}


def parse_size(text: str) -> int:
    """Return the bytes of a size such as ``8GiB``, ``512 MiB`` or ``4096``.

    Raises:
        SimulatorError: it is no such size.
    """
    match = re.fullmatch(r"(\d+)\s*(KiB|MiB|GiB|)", text.strip())
    if match is None or int(match[1]) == 0:
        raise SimulatorError(
            f"the size {text!r} is not a positive number of bytes, KiB, MiB or GiB; "
            "write it like 8GiB."
        )
    return int(match[1]) * _UNITS[match[2]]


@dataclass(frozen=True, slots=True)
class SimulatorOptions:
    """One machine with simulated NPUs.

    Attributes:
        devices: number of NPUs.
        memory: bytes of memory of each NPU. They are counted per process, and taken from the host
            as they are written.
        streams: of each NPU, counted per process; captured graphs hold some.
        soc: chip name that ``aclrtGetSocName`` answers; torch_npu chooses operators by it.
        schedule: one of ``SCHEDULES``.
        seed: of the random schedule.
        trace: file that gets a JSON line per operator launch; empty for none.
        products: whether matrix products are computed. Without, their results are zero: for
            counting launches, where values mean nothing.
        timeout: seconds after which a wait that nothing can end becomes an error.
        peer_timeout: the same for a collective whose peers are alive but do not come.
    """

    devices: int = 1
    memory: int = 8 << 30
    streams: int = 2048
    soc: str = "Ascend910B1"
    schedule: str = "lazy"
    seed: int = 0
    trace: str = ""
    products: bool = True
    timeout: float = 60.0
    peer_timeout: float = 600.0

    def __post_init__(self) -> None:
        if not 1 <= self.devices <= 16:
            raise SimulatorError(
                f"{self.devices} devices cannot be simulated; choose from 1 to 16 (one machine)."
            )
        if self.schedule not in SCHEDULES:
            raise SimulatorError(
                f"the schedule {self.schedule!r} is unknown; choose from {', '.join(SCHEDULES)}."
            )
        if self.memory < 1 << 26:
            raise SimulatorError(
                f"{self.memory} bytes of device memory are too few; torch_npu's allocator takes "
                "20 MiB at a time: give at least 64MiB."
            )
        if self.streams < 1:
            raise SimulatorError(f"{self.streams} streams are too few; give at least 1.")
        if not self.soc.startswith("Ascend"):
            raise SimulatorError(
                f"the chip {self.soc!r} is no Ascend NPU; name one such as Ascend910B1."
            )
        if self.timeout <= 0 or self.peer_timeout <= 0:
            raise SimulatorError(
                f"the timeouts {self.timeout} and {self.peer_timeout} must be positive seconds."
            )

    def to_json(self) -> str:
        """Return the text for the environment: a flat JSON object of strings."""
        return json.dumps({name: str(value) for name, value in asdict(self).items()})

    @classmethod
    def from_environment(
        cls, environment: Mapping[str, str] = os.environ
    ) -> SimulatorOptions | None:
        """Return the options this process runs under; None outside ``ascend-plugin sim run``."""
        text = environment.get(OPTIONS_VARIABLE)
        if not text:
            return None
        values = json.loads(text)
        kinds: Mapping[str, Callable[[str], Any]]
        kinds = {"int": int, "float": float, "str": str, "bool": str(True).__eq__}
        return cls(
            **{
                field.name: kinds[str(field.type)](values[field.name])
                for field in fields(cls)
                if field.name in values
            }
        )
