"""Is a contender's result right? Asked before and after the clock runs."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from ascend_plugin.bench.attention.data import CaseData
from ascend_plugin.bench.parity import FAST_TOLERANCE, TOLERANCES, Parity
from ascend_plugin.bench.timing import Prepared
from ascend_plugin.ops.paged_attention import reference

#: One (token, head) vector may be this much worse than the whole. Early tokens have large outputs,
#: so that the whole alone would hide a wrong late row.
_VECTOR_FACTOR = 8.0

#: The oracle computes at most so many floating point operations, and holds so many scores.
_MAX_FLOP = 4e11
_MAX_SCORES = 2**25


@dataclass(frozen=True)
class Oracle:
    """The right result of an attention case.

    Attributes:
        tolerance: largest error of a right result.
        rows: rows of the output that were computed: all, or an even choice of a large case.
        expected: float64 ``[len(rows), heads, head_dim]``.
    """

    tolerance: float
    rows: torch.Tensor
    expected: torch.Tensor

    def compare(self, result: torch.Tensor) -> Parity:
        """Compare a contender's output ``[tokens, heads, head_dim]``."""
        difference = result[self.rows].double() - self.expected
        whole = float(difference.norm() / self.expected.norm())
        vectors = difference.norm(dim=-1) / self.expected.norm(dim=-1)
        # NaN compares as False, so a result that is not finite is not ok.
        ok = whole <= self.tolerance and float(vectors.max()) <= _VECTOR_FACTOR * self.tolerance
        return Parity(ok, whole if math.isfinite(whole) else None)


def attention_oracle(data: CaseData) -> Oracle:
    """Compute the case in float64 from the reference's pages.

    The rows of a long prefill are computed in chunks: the last ``n`` of the first ``m`` tokens of
    a sequence see the same tokens, whether more tokens follow or not.
    """
    case = data.case
    layout, scale = data.page.layout(), case.geometry.head_dim**-0.5
    tolerance = FAST_TOLERANCE if case.fast else TOLERANCES[case.element]
    rows, expected = [], []
    for sequence, first, count in _chunks(data):
        row = sequence * case.new_tokens + first
        query = data.query[row : row + count]
        out = torch.empty(query.shape, dtype=torch.float64)
        length = case.context - case.new_tokens + first + count
        reference.paged_attention(
            query,
            data.pages,
            out,
            torch.tensor([0, count], dtype=torch.int32),
            torch.tensor([length], dtype=torch.int32),
            data.block_table[sequence : sequence + 1],
            layout,
            scale=scale,
            causal=True,
            window=0,
            soft_cap=0.0,
            alibi_slopes=None,
            sinks=None,
            compute_dtype=torch.float64,
            **data.attention_arguments(),
        )
        rows.append(torch.arange(row, row + count))
        expected.append(out)
    return Oracle(tolerance, torch.cat(rows), torch.cat(expected))


def _chunks(data: CaseData) -> list[tuple[int, int, int]]:
    """Return (sequence, first new token, count): all, or an even choice with both ends."""
    case = data.case
    step = max(1, min(case.new_tokens, _MAX_SCORES // (case.geometry.heads * case.context)))
    chunks = [
        (sequence, first, min(step, case.new_tokens - first))
        for sequence in range(case.batch)
        for first in range(0, case.new_tokens, step)
    ]
    affordable = max(2, int(len(chunks) * _MAX_FLOP / case.flop))
    if len(chunks) <= affordable:
        return chunks
    last = len(chunks) - 1
    return [chunks[round(i * last / (affordable - 1))] for i in range(affordable)]


def check_attention(prepared: Prepared, oracle: Oracle) -> Parity:
    """Run one call into a poisoned output and compare it."""
    prepared.result.fill_(math.nan)
    prepared.run(0)
    return oracle.compare(prepared.result)


def check_write(prepared: Prepared, data: CaseData) -> Parity:
    """Write into every layer and compare all bytes of the pages with the reference's."""
    for layer in range(prepared.layers):
        prepared.run(layer)
    return compare_pages(prepared, data)


def compare_pages(prepared: Prepared, data: CaseData) -> Parity:
    """Compare the bytes of every layer; the reported error is that of the first layer."""
    expected = data.pages.view(torch.uint8)
    ok = all(torch.equal(cache.view(torch.uint8), expected) for cache in prepared.caches)
    difference = prepared.caches[0].double() - data.pages.double()
    error = float(difference.norm() / data.pages.double().norm())
    return Parity(ok, error if math.isfinite(error) else None)
