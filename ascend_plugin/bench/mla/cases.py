"""What ``bench mla`` measures. No import of torch: bad values are refused at once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from ascend_plugin.bench.elements import Element, known
from ascend_plugin.bench.errors import BenchError
from ascend_plugin.bench.machine import last_level_cache_bytes

LatentVariant = Literal["bf16", "fp16", "fp32", "c8d", "c8d-fast", "c8s", "c8s-fast"]
VARIANTS: tuple[LatentVariant, ...] = get_args(LatentVariant)

#: All layers' caches together are at least so many times the last-level cache, and two.
_MIN_CACHE_FACTOR = 4
_MAX_LAYERS = 16


@dataclass(frozen=True, slots=True)
class MlaCase:
    """One decode step of a layer.

    Attributes:
        variant: element type of queries and pages, or how int8 latents are scaled (then queries
            are bf16); "-fast" is the 8-bit mode.
        batch: sequences.
        context: tokens per sequence, the new ones included.
        new_tokens: query tokens per sequence: 1, or more to verify drafts.
        heads: query heads.
        latent_dim: ``kv_lora_rank``.
        rotary_dim: ``qk_rope_head_dim``.
        block_size: tokens in a block of the plugin's cache; vLLM's has 16.
    """

    variant: LatentVariant
    batch: int
    context: int
    new_tokens: int
    heads: int
    latent_dim: int
    rotary_dim: int
    block_size: int

    def __post_init__(self) -> None:
        """Refuse impossible sizes.

        Raises:
            BenchError: a value below 1, or more new tokens than context.
        """
        for name in self.__slots__:
            value = getattr(self, name)
            if isinstance(value, int) and value < 1:
                raise BenchError(f"--{name.replace('_', '-')} {value} must be at least 1.")
        if self.new_tokens > self.context:
            raise BenchError(
                f"--new-tokens {self.new_tokens} exceeds --context {self.context}, which counts "
                "the new tokens too. Raise --context or lower --new-tokens."
            )

    @property
    def label(self) -> str:
        """A short name for progress."""
        return f"mla {self.variant} batch {self.batch} context {self.context}"

    @property
    def element(self) -> Element:
        """Element type of queries, and of vLLM's cache."""
        return "fp16" if self.variant == "fp16" else "fp32" if self.variant == "fp32" else "bf16"

    @property
    def blocks_per_sequence(self) -> int:
        """Blocks of one sequence."""
        return -(-self.context // self.block_size)

    @property
    def flop(self) -> int:
        """Floating point operations of the two products over visible tokens."""
        past, new = self.context - self.new_tokens, self.new_tokens
        visible = new * past + new * (new + 1) // 2
        return 2 * self.heads * (2 * self.latent_dim + self.rotary_dim) * self.batch * visible

    def layers(self, cache_bytes: int) -> int:
        """Caches to go round, so that no call finds its own in the processor's cache."""
        wanted = _MIN_CACHE_FACTOR * last_level_cache_bytes()
        return min(max(-(-wanted // cache_bytes), 2), _MAX_LAYERS)


def make_cases(
    variants: Sequence[str], batches: Sequence[int], contexts: Sequence[int], shape: dict[str, int]
) -> list[MlaCase]:
    """Return every combination.

    Args:
        variants: names.
        batches: sequences of a call.
        contexts: tokens of a sequence.
        shape: the other fields of :class:`MlaCase`.

    Raises:
        BenchError: unknown variants, or impossible sizes.
    """
    names = [known("--variant", name, VARIANTS) for name in variants]
    return [
        MlaCase(name, batch, context, **shape)
        for name in names
        for batch in batches
        for context in contexts
    ]


@dataclass(frozen=True, slots=True)
class MlaRow:
    """One row of the result; docs in benchmarks/README.md."""

    variant: str
    implementation: str
    isa: str | None
    batch: int
    context: int
    new_tokens: int
    heads: int
    latent_dim: int
    rotary_dim: int
    block_size: int
    threads: int
    time_ms: float
    stock_time_ms: float | None
    best_ms: float
    stock_best_ms: float | None
    ratio_vs_stock: float | None
    gflop_per_s: float
    stock_gflop_per_s: float | None
    gb_per_s: float
    rel_l2_vs_fp64: float | None
    rel_l2_vs_pages: float | None
    stock_rel_l2_vs_fp64: float | None
    parity_ok: bool
    bytes_per_token: int
    pairs: int
    note: str | None
