"""The result of ``bench attention``. No import of torch."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class AttentionRow:
    """One row of the result; docs in benchmarks/README.md."""

    phase: str
    variant: str
    implementation: str
    isa: str | None
    batch: int
    context: int
    new_tokens: int
    heads: int
    kv_heads: int
    head_dim: int
    block_size: int
    threads: int
    time_ms: float
    stock_time_ms: float | None
    best_ms: float
    stock_best_ms: float | None
    ratio_vs_stock: float | None
    gb_per_s: float
    read_gb_per_s: float | None
    gflop_per_s: float | None
    rel_l2_vs_fp64: float | None
    rel_l2_vs_pages: float | None
    stock_rel_l2_vs_fp64: float | None
    parity_ok: bool
    kv_tokens_per_gib: int
    kv_tokens_vs_bf16: float
    pairs: int
    note: str | None
