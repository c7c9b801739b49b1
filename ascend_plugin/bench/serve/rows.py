"""Results of ``bench serve``: one row for each model, number of requests and context."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ascend_plugin.bench.attention.cases import quantisation_of
from ascend_plugin.bench.serve.driver import LLAMA_CPP, OURS, STOCK
from ascend_plugin.bench.serve.settings import Settings


@dataclass(frozen=True, slots=True)
class ServeRow:
    """One row of the result; docs in benchmarks/README.md."""

    model: str
    variant: str
    batch: int
    context: int
    new_tokens: int
    rounds: int
    threads: int
    decode_tok_s: float
    stock_decode_tok_s: float | None
    ratio_vs_stock: float | None
    peer_decode_tok_s: float | None
    ratio_vs_peer: float | None
    ttft_ms: float
    stock_ttft_ms: float | None
    ttft_ratio_vs_stock: float | None
    peer_ttft_ms: float | None
    tokens_equal_prefix: int | None
    tokens_compared: int | None
    note: str | None


@dataclass(frozen=True, slots=True)
class Measured:
    """One contender's part of a case.

    Attributes:
        first_token_s: per request.
        round_s: per decode round.
        tokens: every request's output.
        note: what did not run as it should.
    """

    first_token_s: Sequence[float]
    round_s: Sequence[float]
    tokens: Sequence[Sequence[int]]
    note: str | None = None

    @property
    def ttft_ms(self) -> float:
        """Median time to a request's first token."""
        return statistics.median(self.first_token_s) * 1e3


def make_row(
    model: str,
    batch: int,
    context: int,
    settings: Settings,
    measured: Mapping[str, Measured],
    same_weights: bool,
) -> ServeRow:
    """Return the row of a case.

    Args:
        model: as the user named it.
        batch: requests at once.
        context: tokens of a prompt.
        settings: of the run.
        measured: by contender; ours at least.
        same_weights: stock vLLM served our model's weights, so tokens should agree.
    """
    ours, stock, peer = (measured.get(spec.name) for spec in (OURS, STOCK, LLAMA_CPP))
    assert ours is not None
    tokens = batch * settings.new_tokens
    equal, compared = (None, None) if stock is None else equal_prefix(ours.tokens, stock.tokens)
    notes = [ours.note]
    comparable = same_weights and quantisation_of(settings.variant) is None
    if comparable and equal is not None and compared is not None and 2 * equal < compared:
        notes.append("greedy tokens part early: check parity with bench attention")
    return ServeRow(
        model=model,
        variant=settings.variant,
        batch=batch,
        context=context,
        new_tokens=settings.new_tokens,
        rounds=settings.rounds,
        threads=settings.threads,
        decode_tok_s=_digits(tokens / statistics.median(ours.round_s)),
        stock_decode_tok_s=_speed(tokens, stock),
        ratio_vs_stock=_ratio(ours, stock),
        peer_decode_tok_s=_speed(tokens, peer),
        ratio_vs_peer=_ratio(ours, peer),
        ttft_ms=_digits(ours.ttft_ms),
        stock_ttft_ms=None if stock is None else _digits(stock.ttft_ms),
        ttft_ratio_vs_stock=None if stock is None else _digits(stock.ttft_ms / ours.ttft_ms),
        peer_ttft_ms=None if peer is None else _digits(peer.ttft_ms),
        tokens_equal_prefix=equal,
        tokens_compared=compared,
        note="; ".join(filter(None, notes)) or None,
    )


def equal_prefix(ours: Sequence[Sequence[int]], stock: Sequence[Sequence[int]]) -> tuple[int, int]:
    """Return how many tokens agree before the first difference of each request, and of how many."""
    equal = compared = 0
    for mine, theirs in zip(ours, stock, strict=True):
        length = min(len(mine), len(theirs))
        compared += length
        equal += next((i for i in range(length) if mine[i] != theirs[i]), length)
    return equal, compared


def _speed(tokens: int, measured: Measured | None) -> float | None:
    return None if measured is None else _digits(tokens / statistics.median(measured.round_s))


def _ratio(ours: Measured, other: Measured | None) -> float | None:
    """Return the median over rounds of the other's time / ours; None: it did not run."""
    if other is None:
        return None
    pairs = zip(other.round_s, ours.round_s, strict=True)
    return _digits(statistics.median(theirs / mine for theirs, mine in pairs))


def _digits(value: float) -> float:
    """Round to four significant digits: more would be noise."""
    return float(f"{value:.4g}")
