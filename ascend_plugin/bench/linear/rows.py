"""The result of ``bench linear``. No import of torch."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class LinearRow:
    """One row of the result; docs in benchmarks/README.md."""

    scheme: str
    m: int
    n: int
    k: int
    group: int
    implementation: str
    isa: str | None
    threads: int
    layers: int
    time_ms: float
    bf16_time_ms: float
    vllm_bf16_time_ms: float | None
    stock_time_ms: float | None
    best_ms: float
    bf16_best_ms: float
    ratio_vs_bf16: float | None
    ratio_vs_vllm_bf16: float | None
    ratio_vs_stock: float | None
    gb_per_s: float
    gflop_per_s: float
    rel_l2: float | None
    stock_rel_l2: float | None
    parity_ok: bool
    pairs: int
    note: str | None
