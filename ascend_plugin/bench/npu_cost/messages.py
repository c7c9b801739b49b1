"""What the command asks its worker, as JSON. No import of torch."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass(frozen=True, slots=True)
class Probe:
    """One engine, and the decode steps to run on it.

    Attributes:
        folder: with ``config.json``; the weights are random.
        batch: sequences.
        context: tokens of each sequence in the last step, its new one included.
        steps: decode steps; each sequence's prompt is ``context - steps`` tokens long.
        positions: longest context, which decides how wide block tables are.
        warm: whether prompts are prefilled before, one by one, so that their sequences find whole
            blocks and begin to decode together; else all are prefilled in one step.
        share: whether all sequences have one prompt.
        step_tokens: most tokens of a step.
        engine: more arguments of vLLM's ``EngineArgs``.
    """

    folder: str
    batch: int
    context: int
    steps: int
    positions: int
    warm: bool
    share: bool
    step_tokens: int
    engine: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Job:
    """What a worker does: its probes one after the other.

    Attributes:
        probes: engines.
        trace: the file that the simulator appends launches to; empty on hardware.
    """

    probes: tuple[Probe, ...]
    trace: str

    @classmethod
    def from_json(cls, text: str) -> Job:
        """Return the job that :func:`to_json` wrote."""
        told = json.loads(text)
        return cls(tuple(Probe(**probe) for probe in told["probes"]), told["trace"])


@dataclass(frozen=True, slots=True)
class Probed:
    """What a probe found.

    Attributes:
        steps: for each decode step, where its launches begin and end in the trace, in bytes.
        step_us: for each decode step, the time between two events on the device's stream.
        graphs: how vLLM runs a uniform decode batch in the end: ``none``, ``piecewise``, ``full``.
        attention: backends of the layers.
        implementations: which implementation served an operator, by its name.
        device: name of the chip.
    """

    steps: tuple[tuple[int, int], ...]
    step_us: tuple[float, ...]
    graphs: str
    attention: tuple[str, ...]
    implementations: dict[str, list[str]]
    device: str


def to_json(message: Any) -> str:
    """Return a message as one line."""
    return json.dumps(asdict(message))
