"""``beam_topk``: against a sort by hand, its error bound, the exact mode's promise, refusals."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import DTYPES

from ascend_plugin.ops.beam_topk import MAX_K, beam_topk, quantise_logits
from ascend_plugin.ops.beam_topk.reference import LOWEST, candidates

#: What the docstring promises, in steps of the quantisation.
SCORE_BOUND = 0.5 + 2.0**-14
KEPT_BOUND = 1.0 + 2.0**-13


@st.composite
def drawn_logits(draw: st.DrawFn) -> tuple[torch.Tensor, int]:
    """Logits from smooth to almost all equal, with masked tokens, and k."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**16)))
    rows, vocab = draw(st.integers(1, 4)), draw(st.integers(1, 700))
    values = torch.randn((rows, vocab), generator=generator)
    values = values * draw(st.sampled_from([1e-30, 0.1, 3.0, 3e3])) + draw(st.sampled_from([0, 9]))
    if draw(st.booleans()):  # many equals
        values = values.round()
    masked = torch.rand(values.shape, generator=generator) < draw(st.sampled_from([0, 0.3, 0.99]))
    values = values.masked_fill(masked, -torch.inf)
    return values.to(draw(st.sampled_from(DTYPES))), draw(st.integers(1, min(MAX_K, vocab)))


def _by_hand(row: list[float], k: int) -> list[int]:
    return sorted(range(len(row)), key=lambda i: (-row[i], i))[:k]


@given(drawn=drawn_logits())
@settings(max_examples=100)
def test_exact_mode_is_the_exact_order(drawn: tuple[torch.Tensor, int]) -> None:
    logits, k = drawn
    codes, scales = quantise_logits(logits)
    found = beam_topk(codes, scales, k, logits)
    for row, values in enumerate(logits.float().tolist()):
        expected = _by_hand(values, k)
        assert found.indices[row].tolist() == expected
        scores = logits[row, expected].float().clamp(min=LOWEST)
        assert torch.equal(found.scores[row], scores)


@given(drawn=drawn_logits())
@settings(max_examples=100)
def test_quantised_mode_is_the_order_of_codes(drawn: tuple[torch.Tensor, int]) -> None:
    logits, k = drawn
    codes, scales = quantise_logits(logits)
    found = beam_topk(codes, scales, k)
    for row, values in enumerate(codes.tolist()):
        expected = _by_hand(values, k)
        assert found.indices[row].tolist() == expected
        assert torch.equal(found.scores[row], codes[row, expected].float() * scales[row])


@given(drawn=drawn_logits())
@settings(max_examples=100)
def test_quantised_mode_keeps_its_bound(drawn: tuple[torch.Tensor, int]) -> None:
    logits, k = drawn
    logits = logits.float().nan_to_num(neginf=-3.0)  # the bound is about finite logits
    codes, scales = quantise_logits(logits)
    quantised, exact = beam_topk(codes, scales, k), beam_topk(codes, scales, k, logits)
    step = scales.double()[:, None]
    difference = (quantised.scores.double() - exact.scores.double()).abs()
    assert bool((difference <= SCORE_BOUND * step).all())
    kept = logits.gather(1, quantised.indices.long()).double()
    assert bool((kept >= exact.scores[:, -1:].double() - KEPT_BOUND * step).all())
    shift = (quantised.log_probs.double() - exact.log_probs.double()).abs()
    rounding = 2.0**-20 * exact.log_probs.double().abs().clamp(min=1)
    assert bool((shift <= KEPT_BOUND * step + rounding).all())


def test_the_bound_is_reached() -> None:
    """A bound that nothing comes near to says nothing."""
    logits = torch.tensor([[127.0, 10.4999, -10.4999]])
    codes, scales = quantise_logits(logits)
    found = beam_topk(codes, scales, 3)
    assert (found.scores - logits).abs().max() > 0.499 * scales[0]


@given(st.data())
@settings(max_examples=100)
def test_candidates_hold_the_best_for_any_error_below_a_step(data: st.DataObject) -> None:
    """Also for codes of another origin, whose error is more than half a step."""
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 2**16)))
    codes = torch.randint(-127, 128, (3, 200), generator=generator) // data.draw(
        st.sampled_from([1, 8, 60])
    )
    error = (torch.rand(codes.shape, generator=generator, dtype=torch.float64) * 2 - 1) * 0.999
    logits = (codes + error).float()
    k = data.draw(st.integers(1, MAX_K))
    chosen = candidates(codes.to(torch.int8), k)
    for row in range(3):
        assert all(chosen[row, i] for i in _by_hand(logits[row].tolist(), k))
    found = beam_topk(codes.to(torch.int8), torch.ones(3), k, logits)
    assert found.indices[0].tolist() == _by_hand(logits[0].tolist(), k)


def test_the_softmax_is_over_the_kept() -> None:
    logits = torch.randn((3, 500), generator=torch.Generator().manual_seed(1)) * 4
    codes, scales = quantise_logits(logits)
    for found in (beam_topk(codes, scales, 5), beam_topk(codes, scales, 5, logits)):
        expected = torch.log_softmax(found.scores.double(), -1)
        assert (found.log_probs.double() - expected).abs().max() < 1e-6


def test_masked_rows_have_no_nan() -> None:
    logits = torch.full((2, 40), -torch.inf)
    logits[1, 7] = 2.0
    codes, scales = quantise_logits(logits)
    found = beam_topk(codes, scales, 4, logits)
    assert found.indices.tolist() == [[0, 1, 2, 3], [7, 0, 1, 2]]
    assert not found.log_probs.isnan().any()
    assert found.log_probs[1, 0] == 0.0


def test_zero_logits_keep_the_first() -> None:
    codes, scales = quantise_logits(torch.zeros(1, 9))
    assert not codes.any()
    assert not scales.any()
    assert beam_topk(codes, scales, 3).indices.tolist() == [[0, 1, 2]]


def test_empty_and_strided_rows() -> None:
    codes, scales = quantise_logits(torch.randn(4, 64))
    empty = beam_topk(codes[:0], scales[:0], 3)
    assert [list(each.shape) for each in empty] == [[0, 3]] * 3
    wide = torch.full((4, 90), 127, dtype=torch.int8)
    wide[:, :64] = codes
    strided = beam_topk(wide[:, :64], scales, 3)
    assert torch.equal(strided.indices, beam_topk(codes, scales, 3).indices)


CODES, SCALES = quantise_logits(torch.randn(3, 50))
REFUSALS = {
    "codes dtype": ((CODES.int(), SCALES, 3), r"codes must be 2-dimensional torch.int8"),
    "codes rank": ((CODES[0], SCALES, 3), r"codes must be 2-dimensional torch.int8, got 1-dim"),
    "codes stride": ((CODES[:, ::2], SCALES, 3), r"codes must be contiguous in its last dimension"),
    "vocabulary": (
        (torch.zeros((1, 262145), dtype=torch.int8), SCALES[:1], 3),
        r"codes have 262145 columns; at most 262144 are supported. Split the vocabulary",
    ),
    "k 0": (
        (CODES, SCALES, 0),
        r"k=0 is not supported for a vocabulary of 50; allowed are 1 to 16",
    ),
    "k 17": ((CODES, SCALES, 17), r"k=17 is not supported.*lower the beam width"),
    "k beyond": ((CODES[:, :5], SCALES, 6), r"k=6 .* vocabulary of 5; allowed are 1 to 5"),
    "scales dtype": ((CODES, SCALES.double(), 3), r"scales must be float32 \[3\].*float64"),
    "scales shape": ((CODES, SCALES[:2], 3), r"scales must be float32 \[3\].*quantise_logits"),
    "scales stride": (
        (CODES, torch.stack([SCALES, SCALES], 1)[:, 0], 3),
        r"scales must be contiguous; call .contiguous\(\)",
    ),
    "logits dtype": (
        (CODES, SCALES, 3, CODES),
        r"logits has dtype torch.int8; allowed are",
    ),
    "logits shape": (
        (CODES, SCALES, 3, torch.zeros(3, 49)),
        r"logits \[3, 49\] must have the shape of codes \[3, 50\]",
    ),
    "logits stride": (
        (CODES, SCALES, 3, torch.zeros(3, 100)[:, ::2]),
        r"logits must be contiguous in their last dimension",
    ),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_refusals(name: str) -> None:
    arguments, message = REFUSALS[name]
    with pytest.raises(ValueError, match=message):
        beam_topk(*arguments)


@pytest.mark.parametrize("exact", [False, True])
def test_opcheck_and_dispatcher(exact: bool) -> None:
    logits = torch.randn(3, 300, dtype=torch.float16)
    codes, scales = quantise_logits(logits)
    arguments = (codes, scales, 4, logits if exact else None)
    torch.library.opcheck(torch.ops.ascend_plugin.beam_topk.default, arguments)
    for direct, dispatched in zip(
        beam_topk(*arguments), torch.ops.ascend_plugin.beam_topk(*arguments), strict=True
    ):
        assert torch.equal(direct, dispatched)
