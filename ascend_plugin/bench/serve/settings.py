"""What ``bench serve`` measures, checked."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ascend_plugin.bench import machine
from ascend_plugin.bench.attention.cases import (
    VARIANTS,
    Variant,
    element_of,
    is_fast,
    quantisation_of,
)
from ascend_plugin.bench.elements import Element
from ascend_plugin.bench.errors import BenchError
from ascend_plugin.bench.serve.messages import Execution

#: Tokens of a step: what vLLM's offline engine takes on a CPU.
STEP_TOKENS = 4096


@dataclass(frozen=True, slots=True)
class Settings:
    """What is measured.

    Attributes:
        batches: requests at once.
        contexts: prompt lengths.
        new_tokens: decode steps of a round.
        rounds: decode rounds of each contender.
        threads: OpenMP threads of each contender.
        variant: element type of weights and cache, or how our int8 cache is scaled (then the
            weights and vLLM's cache are bf16).
        execution: with or without torch.compile, or each as it does by default.
        scales: file of static scales, for the variants that need one.
    """

    batches: tuple[int, ...]
    contexts: tuple[int, ...]
    new_tokens: int
    rounds: int
    threads: int
    variant: Variant
    execution: Execution = "default"
    scales: Path | None = None

    def __post_init__(self) -> None:
        """Refuse impossible values.

        Raises:
            BenchError: a value out of its bounds.
        """
        bounds = [
            ("--new-tokens", self.new_tokens, 10_000),
            ("--rounds", self.rounds, 1000),
            ("--threads", self.threads, machine.available_cpus()),
        ]
        for option, value, high in [
            *(("--batch", batch, STEP_TOKENS // 2) for batch in self.batches),
            *bounds,
        ]:
            if not 1 <= value <= high:
                raise BenchError(f"{option} {value} is not possible; use 1 to {high}.")
        for context in self.contexts:
            if context < 1:
                raise BenchError(f"--context {context} must be at least 1.")
        if self.variant not in VARIANTS:
            raise BenchError(f"--variant {self.variant} is unknown; use {', '.join(VARIANTS)}.")
        static = quantisation_of(self.variant) in ("c8s", "c8p")
        if static != (self.scales is not None):
            raise BenchError(
                f"--variant {self.variant} needs --scales FILE, the static scales of the model; "
                "make it with: ascend-plugin calibrate kv."
                if static
                else f"--scales {self.scales} is of no use to --variant {self.variant}; leave it "
                "out, or use --variant c8s or c8p."
            )

    @property
    def element(self) -> Element:
        """Element type of the weights and of vLLM's cache."""
        return element_of(self.variant)

    @property
    def max_batch(self) -> int:
        """Requests that every engine has room for."""
        return max(self.batches)

    @property
    def max_length(self) -> int:
        """Tokens of the longest sequence."""
        return max(context + self.max_tokens(self.max_batch, context) for context in self.contexts)

    def kv_cache_settings(self) -> dict[str, Any]:
        """Return the plugin's settings of an int8 cache; empty: it is not int8."""
        variant = quantisation_of(self.variant)
        if variant is None:
            return {}
        settings = {"variant": variant, "precision": "fast" if is_fast(self.variant) else "exact"}
        return settings | ({"scales": str(self.scales)} if self.scales else {})

    def max_tokens(self, batch: int, context: int) -> int:
        """Output tokens that no request may reach before all rounds are done.

        The first request decodes while the last is still being prefilled.
        """
        prefill_steps = -(-batch * context // (STEP_TOKENS - batch)) + batch
        return prefill_steps + self.rounds * self.new_tokens + 2
