"""What is measured: scheme and shape of one linear layer. No import of torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from ascend_plugin.bench.elements import known
from ascend_plugin.bench.errors import BenchError
from ascend_plugin.bench.machine import last_level_cache_bytes

Scheme = Literal["w4a16", "w4a16-zp", "w8a16", "w8a8", "bf16"]
SCHEMES: tuple[Scheme, ...] = get_args(Scheme)

#: Columns and inputs of the layers of known models: qkv, o, gate and up, down (and lm_head).
MODEL_SHAPES: dict[str, tuple[tuple[int, int], ...]] = {
    "smollm2": ((960, 576), (576, 576), (3072, 576), (576, 1536), (49152, 576)),
    "7b": ((12288, 4096), (4096, 4096), (22016, 4096), (4096, 11008)),
}
DEFAULT_SHAPES = ("4096x4096",)
DEFAULT_ROWS = (1, 2, 4, 8, 512)
DEFAULT_GROUP = 64

#: All layers' quantised weights together are at least this many times the last-level cache, so
#: that every call finds its own in memory.
_CACHE_FACTOR = 2
_MIN_LAYERS, _MAX_LAYERS = 2, 512


def scheme_label(scheme: str, group: int, k: int) -> str:
    """Return a scheme's name with what shares a scale, where there are scales."""
    if scheme == "bf16":
        return scheme
    return f"{scheme} channel" if group == k else f"{scheme} g{group}"


@dataclass(frozen=True, slots=True)
class LinearCase:
    """One measurement.

    Attributes:
        scheme: bits of weights and activations; "-zp": with zero points; bf16: not quantised.
            Activations come and results leave as bfloat16.
        m: rows (tokens) of a call.
        n: columns (output features).
        k: input features.
        group: k that share a scale; k: one per column.
    """

    scheme: Scheme
    m: int
    n: int
    k: int
    group: int

    @property
    def label(self) -> str:
        """A short name for progress and plots."""
        return f"{scheme_label(self.scheme, self.group, self.k)} {self.n}×{self.k} m {self.m}"

    @property
    def quantised(self) -> bool:
        """Whether weights are integers."""
        return self.scheme != "bf16"

    @property
    def bits(self) -> int:
        """Bits of a weight."""
        if not self.quantised:
            return 16
        return 4 if self.scheme.startswith("w4") else 8

    @property
    def zeros(self) -> bool:
        """Whether weights have zero points."""
        return self.scheme.endswith("-zp")

    @property
    def weight_bytes(self) -> int:
        """Bytes of the codes of one layer, or of its weights."""
        return self.n * self.k * self.bits // 8

    @property
    def bf16_bytes(self) -> int:
        """Bytes of one layer in bfloat16."""
        return self.n * self.k * 2

    @property
    def flop(self) -> int:
        """Floating point (or integer) operations of the product."""
        return 2 * self.m * self.n * self.k

    @property
    def layers(self) -> int:
        """Weights to go round, so that no call finds its own in the processor's cache."""
        wanted = _CACHE_FACTOR * last_level_cache_bytes()
        return min(max(-(-wanted // self.weight_bytes), _MIN_LAYERS), _MAX_LAYERS)


def make_cases(
    schemes: Sequence[str], shapes: Sequence[str], rows: Sequence[int], group: int
) -> list[LinearCase]:
    """Return every combination; empty sequences mean the defaults.

    Args:
        schemes: names of :data:`SCHEMES`.
        shapes: ``NxK``, or names of :data:`MODEL_SHAPES`.
        rows: rows of a call.
        group: k that share a scale; 0: a scale per column. W8A8 has one per column in any
            case, bf16 none.

    Raises:
        BenchError: something unknown or impossible.
    """
    cases = []
    for name in schemes or ("w4a16",):
        scheme = known("--scheme", name, SCHEMES)
        for n, k in (pair for shape in shapes or DEFAULT_SHAPES for pair in _shape(shape)):
            size = k if scheme in ("w8a8", "bf16") or group == 0 else group
            if size != k and (size < 1 or size % 32 or k % size):
                raise BenchError(
                    f"--group {group} does not cut k={k} into equal parts; use a multiple of 32 "
                    "that divides it, or 0 for a scale per column."
                )
            for m in rows or DEFAULT_ROWS:
                if m < 1:
                    raise BenchError(f"--rows {m} must be at least 1.")
                cases.append(LinearCase(scheme, m, n, k, size))
    return cases


def _shape(text: str) -> tuple[tuple[int, int], ...]:
    if text in MODEL_SHAPES:
        return MODEL_SHAPES[text]
    n, _, k = text.partition("x")
    if n.isdigit() and k.isdigit() and int(n) > 0 and int(k) > 0:
        return ((int(n), int(k)),)
    raise BenchError(
        f"--shape {text} is unknown; use NxK (columns x inputs), or {', '.join(MODEL_SHAPES)}."
    )
