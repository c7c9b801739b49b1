"""What the command asks its worker, as JSON. No import of torch."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass(frozen=True, slots=True)
class Probe:
    """One engine, and the decode steps to run on it.

    Attributes:
        folder: with ``config.json``; the weights are vLLM's dummy ones, or zeros.
        batch: sequences.
        contexts: one after the other: tokens of each sequence in the last step, its new one
            included.
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
    contexts: tuple[int, ...]
    steps: int
    positions: int
    warm: bool
    share: bool
    step_tokens: int
    engine: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class KernelShape:
    """A launch of the AscendC kernel of attention, apart from any engine.

    Attributes:
        variant: of the pages.
        heads: query heads.
        kv_heads: key/value heads.
        head_dim: elements of a head.
        block_size: tokens in a block.
        batch: sequences.
        context: tokens of each, new ones included.
        query_tokens: new ones: 1, or 1 and drafts.
    """

    variant: str
    heads: int
    kv_heads: int
    head_dim: int
    block_size: int
    batch: int
    context: int
    query_tokens: int


@dataclass(frozen=True, slots=True)
class Job:
    """What a worker does: its probes one after the other, then its kernels.

    Attributes:
        probes: engines.
        kernels: launches of one kernel.
        trace: the file that the simulator appends launches to; empty on hardware.
    """

    probes: tuple[Probe, ...]
    kernels: tuple[KernelShape, ...]
    trace: str

    @classmethod
    def from_json(cls, text: str) -> Job:
        """Return the job that :func:`to_json` wrote."""
        told = json.loads(text)
        probes = [each | {"contexts": tuple(each["contexts"])} for each in told["probes"]]
        return cls(
            tuple(Probe(**each) for each in probes),
            tuple(KernelShape(**each) for each in told["kernels"]),
            told["trace"],
        )

    def answers(self) -> int:
        """Return how many answers the worker gives."""
        return sum(len(probe.contexts) for probe in self.probes) + len(self.kernels)


@dataclass(frozen=True, slots=True)
class Probed:
    """What a probe found at one context.

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


@dataclass(frozen=True, slots=True)
class Launched:
    """What a launch of a kernel found.

    Attributes:
        place: where it begins and ends in the trace, in bytes.
        pages_bytes: of the pages of all sequences up to their lengths, by the page's format.
        us: hardware: median time of a launch; null on a simulated NPU.
    """

    place: tuple[int, int]
    pages_bytes: float
    us: float | None


def to_json(message: Any) -> str:
    """Return a message as one line."""
    return json.dumps(asdict(message))
