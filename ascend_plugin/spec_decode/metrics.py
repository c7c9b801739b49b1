"""What the choice of drafts decided, from the engine's process to vLLM's ``/metrics``."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from prometheus_client import REGISTRY, CollectorRegistry
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from ascend_plugin.metrics_folder import files_of, new_file

_KIND = "drafts"
#: Numbers before the counts of steps: how many of those follow, drafts now, expected speed-up.
_HEAD = 3
_BYTES = 8


class DraftGauges:
    """Numbers of one engine, in memory that the server reads."""

    def __init__(self, model: str, most: int) -> None:
        """Make them.

        Args:
            model: name under which the model is served.
            most: drafts of a step at most.
        """
        size = _HEAD + most + 1
        path = new_file(
            _KIND,
            torch.tensor([most + 1.0]).double().numpy().tobytes().ljust(size * _BYTES, b"\0")
            + model.encode(),
        )
        self._values = (
            torch.zeros(size, dtype=torch.float64)
            if path is None
            else torch.from_file(str(path), shared=True, size=size, dtype=torch.float64)
        ).numpy()

    def count(self, drafts: int) -> None:
        """Count a step that made so many drafts."""
        self._values[_HEAD + drafts] += 1

    def set(self, drafts: int, speedup: float) -> None:
        """Say what is chosen now and how much faster decoding should be for it."""
        self._values[1:_HEAD] = drafts, speedup


@dataclass(frozen=True, slots=True)
class Choices:
    """What an engine decided: the number of drafts now, what it should gain, steps by number."""

    model: str
    drafts: int
    speedup: float
    steps: tuple[int, ...]


def read_choices() -> list[Choices]:
    """Return what the engines of this server decided."""
    found = []
    for path in files_of(_KIND):
        data = path.read_bytes()
        count = int(torch.frombuffer(bytearray(data[:_BYTES]), dtype=torch.float64))
        end = (_HEAD + count) * _BYTES
        values = torch.frombuffer(bytearray(data[:end]), dtype=torch.float64).tolist()
        steps = tuple(int(value) for value in values[_HEAD:])
        found.append(Choices(data[end:].decode(), int(values[1]), values[2], steps))
    return found


class DraftCollector(Collector):
    """Reads the numbers of all engines when it is asked."""

    def collect(self) -> Iterator[Metric]:
        """Yield the number of drafts now, the expected speed-up, and steps by number of drafts."""
        prefix, name = "ascend_plugin:speculation_", ["model_name"]
        drafts = GaugeMetricFamily(prefix + "drafts", "Drafts that a step makes.", labels=name)
        speedup = GaugeMetricFamily(
            prefix + "expected_speedup",
            "How many times as fast decoding should be as without drafts.",
            labels=name,
        )
        steps = CounterMetricFamily(
            prefix + "steps", "Steps by the number of drafts made.", labels=[*name, "drafts"]
        )
        for choices in read_choices():
            drafts.add_metric([choices.model], choices.drafts)
            speedup.add_metric([choices.model], choices.speedup)
            for number, count in enumerate(choices.steps):
                steps.add_metric([choices.model, str(number)], count)
        yield from (drafts, speedup, steps)


_collector = DraftCollector()


def register_collector(registry: CollectorRegistry = REGISTRY) -> None:
    """Add the numbers to a registry. Idempotent."""
    if _collector not in registry._collector_to_names:
        registry.register(_collector)
