"""What is measured: phase, element type and shape of one case. No import of torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from ascend_plugin.bench.elements import ELEMENTS, ITEMSIZE, Element, known
from ascend_plugin.bench.errors import BenchError
from ascend_plugin.bench.machine import last_level_cache_bytes

Phase = Literal["decode", "prefill", "write"]
Int8Variant = Literal["c8d", "c8d-fast", "c8s", "c8s-fast", "c8p", "c8p-fast"]
Variant = Element | Int8Variant
Quantised = Literal["c8d", "c8s", "c8p"]
PHASES: tuple[Phase, ...] = get_args(Phase)
INT8_VARIANTS: tuple[Int8Variant, ...] = get_args(Int8Variant)
VARIANTS: tuple[Variant, ...] = (*ELEMENTS, *INT8_VARIANTS)

#: Sequences of a call (write: tokens of a call) when the user names none.
DEFAULT_BATCHES: dict[Phase, tuple[int, ...]] = {
    "decode": (1, 8),
    "prefill": (1,),
    "write": (8, 2048),
}
DEFAULT_CONTEXT = 8192
DEFAULT_NEW_TOKENS = 2048

#: All layers' caches together are at least this large, and at least this many times the last-level
#: cache, so that every call finds its K and V in memory.
_MIN_CACHE_BYTES = 192 * 2**20
_MIN_CACHE_FACTOR = 4
_MIN_LAYERS, _MAX_LAYERS = 2, 64


def element_of(variant: Variant) -> Element:
    """Return the element type beside a variant's pages: the model's, and of vLLM's cache."""
    return next((name for name in ELEMENTS if name == variant), "bf16")


def quantisation_of(variant: Variant) -> Quantised | None:
    """Return how a variant's pages are scaled; None: they are not int8."""
    return next((name for name in get_args(Quantised) if variant.startswith(name)), None)


def is_fast(variant: Variant) -> bool:
    """Say whether attention over a variant's pages uses 8-bit products."""
    return variant.endswith("-fast")


@dataclass(frozen=True, slots=True)
class Geometry:
    """The attention layer.

    Attributes:
        heads: query heads.
        kv_heads: key/value heads; they divide ``heads``.
        head_dim: elements per head.
        block_size: tokens in a block of the cache.
    """

    heads: int = 32
    kv_heads: int = 8
    head_dim: int = 128
    block_size: int = 128

    def __post_init__(self) -> None:
        """Refuse shapes that are no attention layer.

        Raises:
            BenchError: a value below 1, or query heads that kv heads do not divide.
        """
        for name in ("heads", "kv_heads", "head_dim", "block_size"):
            _require_positive(f"--{name.replace('_', '-')}", getattr(self, name))
        if self.heads % self.kv_heads:
            raise BenchError(
                f"--heads {self.heads} is not a multiple of --kv-heads {self.kv_heads}: every kv "
                "head serves the same number of query heads. Change one of them."
            )


@dataclass(frozen=True, slots=True)
class Case:
    """One measurement.

    Attributes:
        phase: decode (one new token per sequence), prefill (many) or write (K and V into pages).
        variant: element type of queries and pages, or how int8 pages are scaled (then queries are
            bf16); "-fast" is the 8-bit mode of attention.
        batch: sequences of a call; for write the tokens of a call.
        context: tokens per sequence, the new ones included; for write the tokens of a cache.
        new_tokens: query rows per sequence; 1 for decode and write.
        geometry: the layer.
    """

    phase: Phase
    variant: Variant
    batch: int
    context: int
    new_tokens: int
    geometry: Geometry

    def __post_init__(self) -> None:
        """Refuse impossible sizes.

        Raises:
            BenchError: a value below 1, or more new tokens than context.
        """
        _require_positive("--batch", self.batch)
        _require_positive("--context", self.context)
        _require_positive("--new-tokens", self.new_tokens)
        if self.new_tokens > self.context:
            raise BenchError(
                f"--new-tokens {self.new_tokens} exceeds --context {self.context}, which counts "
                "the new tokens too. Raise --context or lower --new-tokens."
            )

    @property
    def label(self) -> str:
        """A short name for progress and plots."""
        new = f" new {self.new_tokens}" if self.phase == "prefill" else ""
        what = "tokens" if self.phase == "write" else "batch"
        return f"{self.phase} {self.variant} {what} {self.batch} context {self.context}{new}"

    @property
    def element(self) -> Element:
        """Element type of queries, keys and values, and of vLLM's cache."""
        return element_of(self.variant)

    @property
    def quantisation(self) -> Quantised | None:
        """How the plugin's pages are scaled; None: they are not int8."""
        return quantisation_of(self.variant)

    @property
    def fast(self) -> bool:
        """Whether attention uses 8-bit products."""
        return is_fast(self.variant)

    @property
    def itemsize(self) -> int:
        """Bytes of one element of K or V in the plugin's pages."""
        return ITEMSIZE[self.element] if self.quantisation is None else 1

    @property
    def blocks_per_sequence(self) -> int:
        """Blocks of one sequence; for write, of the cache."""
        tokens = max(self.context, self.batch) if self.phase == "write" else self.context
        return -(-tokens // self.geometry.block_size)

    @property
    def num_blocks(self) -> int:
        """Blocks of one layer's cache."""
        return self.blocks_per_sequence * (1 if self.phase == "write" else self.batch)

    @property
    def token_bytes(self) -> int:
        """Bytes of K and V of one token in the plugin's pages, without scales and patches."""
        return 2 * self.geometry.kv_heads * self.geometry.head_dim * self.itemsize

    @property
    def cache_bytes(self) -> int:
        """Bytes of one layer's cache, without scales and patches."""
        return self.num_blocks * self.geometry.block_size * self.token_bytes

    @property
    def stock_cache_bytes(self) -> int:
        """Bytes of one layer's cache of vLLM, which has no int8."""
        return self.cache_bytes // self.itemsize * ITEMSIZE[self.element]

    @property
    def moved_bytes(self) -> int:
        """Bytes of K and V that one call must read (write: store) at least once.

        Scales and patches are not counted.
        """
        tokens = self.batch if self.phase == "write" else self.batch * self.context
        return tokens * self.token_bytes

    @property
    def flop(self) -> int:
        """Floating point operations of the two products over visible tokens; 0 for write."""
        if self.phase == "write":
            return 0
        past, new = self.context - self.new_tokens, self.new_tokens
        visible = new * past + new * (new + 1) // 2
        return 4 * self.geometry.heads * self.geometry.head_dim * self.batch * visible

    @property
    def layers(self) -> int:
        """Caches to go round, so that no call finds its own in the processor's cache."""
        wanted = max(_MIN_CACHE_BYTES, _MIN_CACHE_FACTOR * last_level_cache_bytes())
        return min(max(-(-wanted // self.cache_bytes), _MIN_LAYERS), _MAX_LAYERS)


def make_cases(
    phases: Sequence[str],
    variants: Sequence[str],
    batches: Sequence[int],
    contexts: Sequence[int],
    new_tokens: int,
    geometry: Geometry,
) -> list[Case]:
    """Return every combination; empty sequences mean each phase's defaults.

    Raises:
        BenchError: unknown phases or variants, or impossible sizes.
    """
    known_phases = [known("--phase", phase, PHASES) for phase in phases or PHASES]
    known_variants = [known("--variant", variant, VARIANTS) for variant in variants or ("bf16",)]
    cases = []
    for phase in known_phases:
        fallback = new_tokens if phase == "prefill" else DEFAULT_CONTEXT
        for variant in known_variants:
            for batch in batches or DEFAULT_BATCHES[phase]:
                for context in contexts or (fallback,):
                    new = new_tokens if phase == "prefill" else 1
                    cases.append(Case(phase, variant, batch, context, new, geometry))
    return cases


def same_shape(cases: Sequence[Case]) -> list[list[Case]]:
    """Return cases in groups that differ in nothing but how the plugin's pages hold K and V.

    They share vLLM's times, so they are measured in the same turns.
    """
    groups: dict[tuple[object, ...], list[Case]] = {}
    for case in dict.fromkeys(cases):
        key = case.phase, case.element, case.batch, case.context, case.new_tokens, case.geometry
        groups.setdefault(key, []).append(case)
    return list(groups.values())


def _require_positive(option: str, value: int) -> None:
    if value < 1:
        raise BenchError(f"{option} {value} must be at least 1.")
