"""How a bench of operators runs. No import of torch: bad values are refused at once."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from ascend_plugin.bench import machine
from ascend_plugin.bench.errors import BenchError


@dataclass(frozen=True, slots=True)
class Settings:
    """How the cases run.

    Attributes:
        threads: OpenMP threads of both contenders.
        seconds: time to measure each case.
        implementation: the plugin's implementation; None: what the engine would use.
        isa: instruction set of the native kernels; None: the best.
    """

    threads: int
    seconds: float
    implementation: Literal["native", "reference"] | None = None
    isa: str | None = None

    def __post_init__(self) -> None:
        """Refuse impossible settings.

        Raises:
            BenchError: threads, seconds or the combination of implementation and isa.
        """
        cpus = machine.available_cpus()
        if not 1 <= self.threads <= cpus:
            raise BenchError(
                f"--threads {self.threads} is not possible: this process may use {cpus} CPU(s). "
                f"Use 1 to {cpus}."
            )
        if not 0 < self.seconds <= 3600:
            raise BenchError(f"--seconds {self.seconds:g} must be above 0 and at most 3600.")
        if self.isa and self.implementation == "reference":
            raise BenchError(
                f"--isa {self.isa} chooses native kernels, but --implementation reference is plain "
                "torch. Leave one of them out."
            )
