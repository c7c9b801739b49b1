"""Which implementation runs: order, policy, environment and the reasons that are kept."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from functools import partial

import pytest
import torch
from attention_cases import Case, make_batch
from implementations import forced

from ascend_plugin.ops import dispatch, kv_cache_write, native, paged_attention
from ascend_plugin.ops.dispatch import Implementation, Operator, Support
from ascend_plugin.ops.page_layout import Quantisation
from ascend_plugin.ops.paged_attention import reference


@pytest.fixture
def operator() -> Iterator[Operator[int]]:
    """An operator of two implementations: native serves even requests, reference all below 100."""
    known = dict(dispatch._operators)

    def even(request: int) -> Support:
        return Support(request % 2 == 0, "even" if request % 2 == 0 else f"{request} is odd")

    def small(request: int) -> Support:
        return Support(request < 100, "small" if request < 100 else f"{request} is too large")

    yield Operator(
        "half",
        (
            Implementation("native", even, lambda n: n // 2),
            Implementation("reference", small, lambda n: n / 2),
        ),
    )
    dispatch.set_policy("auto")
    dispatch._operators.clear()
    dispatch._operators.update(known)


def test_the_first_that_supports_a_request_is_chosen(operator: Operator[int]) -> None:
    choice = operator.choose(4)
    assert (choice.implementation.name, choice.reason, choice.rejected) == ("native", "even", ())
    choice = operator.choose(5)
    assert choice.implementation.name == "reference"
    assert choice.rejected == (("native", "5 is odd"),)


@pytest.mark.parametrize("policy", ["native", "reference"])
def test_a_policy_forces_an_implementation(operator: Operator[int], policy: str) -> None:
    assert operator.choose(4).implementation.name == "native"
    dispatch.set_policy(policy)
    choice = operator.choose(4)
    assert choice.implementation.name == policy, "set_policy must forget earlier choices"
    if policy == "reference":
        assert choice.rejected == (("native", "the policy asks for 'reference'"),)


def test_a_refusal_lists_every_reason_and_the_remedy(operator: Operator[int]) -> None:
    with pytest.raises(dispatch.UnsupportedRequestError) as refused:
        operator.choose(101)
    assert str(refused.value) == (
        "no implementation of half serves 101 (native: 101 is odd; reference: 101 is too large). "
        "Set ops.implementation to one of auto, native, reference in --additional-config."
    )
    dispatch.set_policy("native")
    with pytest.raises(dispatch.UnsupportedRequestError, match="the policy asks for 'native'"):
        operator.choose(5)


def test_the_environment_wins(operator: Operator[int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(dispatch.POLICY_VARIABLE, "reference")
    assert dispatch.policy() == "reference"
    dispatch.set_policy("native")
    assert operator.choose(4).implementation.name == "reference"


def test_an_unknown_policy_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="policy='fast' is unknown; use one of auto, native, ref"):
        dispatch.set_policy("fast")
    monkeypatch.setenv(dispatch.POLICY_VARIABLE, "cuda")
    with pytest.raises(ValueError, match="ASCEND_PLUGIN_OPS='cuda' is unknown; use one of auto"):
        dispatch.policy()


def test_a_choice_is_logged_once(operator: Operator[int], monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[str] = []
    handler = logging.Handler(logging.INFO)
    handler.emit = lambda record: told.append(record.getMessage())  # type: ignore[method-assign]
    # The logger's own: handlers above it are the process's, which other tests share.
    monkeypatch.setattr(dispatch.logger, "handlers", [handler])
    dispatch.logger.setLevel(logging.INFO)
    for _ in range(3):
        operator.choose(4)
        operator.choose(5)
    assert told == [
        "half runs on 'native' for 4: even",
        "half runs on 'reference' for 5: small",
    ]


def test_both_operators_are_known() -> None:
    known = dispatch.operators()
    for module in (paged_attention, kv_cache_write):
        assert known[module.operator.name] is module.operator
        assert [i.name for i in module.operator.implementations] == ["native", "reference"]


def test_the_forced_implementation_runs(implementation: str) -> None:
    """What every other test of this folder relies on."""
    batch = make_batch(Case(((1, 5),)))
    request = paged_attention.AttentionRequest(torch.float32, torch.float32, 4, 2, 64, 16)
    batch.run()
    policy, _, isa = implementation.partition("-")
    choice = paged_attention.operator.choose(request)
    assert choice.implementation.name == policy
    (bound,) = paged_attention.operator._bound.values()
    assert isinstance(bound.run, partial)
    if isa:
        assert bound.run.func is native.paged_attention
        assert bound.run.args[0].isa == isa
    else:
        assert bound.run.func is reference.paged_attention


@pytest.mark.parametrize("quantisation", Quantisation)
def test_auto_takes_the_native_kernels(quantisation: Quantisation) -> None:
    page = torch.int8 if quantisation else torch.bfloat16
    shape = (2, 64, 16, quantisation)  # kv heads, head dimension, block size
    attention = paged_attention.AttentionRequest(torch.bfloat16, page, 4, *shape)
    write = kv_cache_write.WriteRequest(torch.bfloat16, page, *shape)
    with forced("auto"):
        assert paged_attention.operator.choose(attention).implementation.name == "native"
        assert kv_cache_write.operator.choose(write).implementation.name == "native"
