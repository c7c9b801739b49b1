"""Training on a tiny base: it learns, goes on after an interruption, and ends by itself."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from ascend_plugin.mtp.batches import Batch, epoch
from ascend_plugin.mtp.errors import MTPError
from ascend_plugin.mtp.hidden import TOP, HiddenCache, text_samples
from ascend_plugin.mtp.layer import pass_mask
from ascend_plugin.mtp.objective import Head, choose_head, cross_entropy
from ascend_plugin.mtp.train import Trainer, TrainPlan
from ascend_plugin.spec_decode.token_order import TokenOrder

PLAN = TrainPlan(minutes=30, epochs=4, batch_tokens=256, head_tokens=256, check_steps=8)


def quiet(*_) -> None:
    """Report nothing."""


@pytest.fixture
def trainer(base, readings, tmp_path):
    def make(plan: TrainPlan = PLAN) -> Trainer:
        return Trainer(base, readings[4:], readings[:4], plan, tmp_path)

    return make


def test_it_learns(trainer) -> None:
    made = trainer()
    course = made.run(quiet)
    first, best = course.points[0], course.best()
    assert best is not None
    assert course.epoch == PLAN.epochs
    assert course.points[-1].step == course.step
    assert best.loss < first.loss - 0.2
    assert best.acceptance[0] > 2 / 256
    for name, weight in made.best_weights.items():
        assert weight.dtype == torch.bfloat16, name


def test_an_interrupted_run_goes_on(trainer) -> None:
    whole = trainer().run(quiet)
    made = trainer(replace(PLAN, epochs=6))
    assert (made.course.step, made.course.points) == (whole.step, whole.points)
    course = made.run(quiet)
    assert course.points[: len(whole.points)] == whole.points
    assert course.step > whole.step
    assert course.epoch == 6
    assert course.seconds > whole.seconds


def test_an_interruption_changes_nothing_but_the_time(base, readings, tmp_path) -> None:
    """The same batches with the same noise: two halves are the whole."""

    class Stop(Exception):
        pass

    def stop(what: str, *_) -> None:
        if "step 8," in what:
            raise Stop

    def make(name: str) -> Trainer:
        (tmp_path / name).mkdir(exist_ok=True)
        # So much time that its share of the rate is the same.
        return Trainer(
            base, readings[4:], readings[:4], replace(PLAN, minutes=1e9, epochs=2), tmp_path / name
        )

    whole = make("whole")
    whole.run(quiet)
    with pytest.raises(Stop):
        make("halves").run(stop)
    halves = make("halves")
    assert halves.course.step == 8
    halves.run(quiet)
    assert [p.acceptance for p in halves.course.points] == [
        p.acceptance for p in whole.course.points
    ]
    for name, weight in whole.layer.state_dict().items():
        torch.testing.assert_close(halves.layer.state_dict()[name], weight, rtol=1e-3, atol=1e-4)


def test_another_plan_is_refused(trainer) -> None:
    trainer().run(quiet)
    with pytest.raises(
        MTPError, match=r"differs in noise\. Repeat .* or start anew with --restart"
    ):
        trainer(replace(PLAN, noise=0.3))


def test_it_ends_when_nothing_gets_better(trainer) -> None:
    still = replace(PLAN, matrix_rate=0.0, vector_rate=0.0, check_steps=2, patience=2)
    course = trainer(still).run(quiet)
    assert len(course.points) == 3
    assert len({tuple(point.acceptance) for point in course.points}) == 1


def test_it_begins_with_a_given_layer(base, readings, trainer, tmp_path) -> None:
    learnt = trainer()
    learnt.run(quiet)
    still = replace(PLAN, matrix_rate=0.0, vector_rate=0.0, patience=1, start="a digest")
    (tmp_path / "again").mkdir()
    again = Trainer(
        base, readings[4:], readings[:4], still, tmp_path / "again", learnt.best_weights
    )
    again.run(quiet)
    for name, weight in learnt.best_weights.items():
        assert torch.equal(again.best_weights[name], weight), name


@pytest.mark.parametrize(("decay", "passes"), [(1e-9, 1), (1.0, 2)])
def test_later_drafts_are_learnt_while_rates_fall(trainer, readings, decay, passes) -> None:
    made = trainer(replace(PLAN, decay=decay, epochs=1, check_steps=1000))
    calls, checks = [], []
    made.layer.register_forward_hook(lambda *_: calls.append(1))
    course = made.run(lambda what, *_: checks.append(what))
    drafts_of_checks = 3 * len(list(epoch(readings[:4], 8192, 0))) * len(checks)
    assert len(calls) == passes * course.step + drafts_of_checks


def test_nothing_to_learn_from(base, readings, tmp_path) -> None:
    with pytest.raises(MTPError, match="0 sequences to learn from and 4 to check with"):
        Trainer(base, [], readings[:4], PLAN, tmp_path)


def test_a_head_keeps_the_tokens_with_most_mass(base, readings) -> None:
    mass = torch.zeros(base.shape.vocabulary)
    for reading in readings:
        mass.index_add_(0, reading.top_ids.flatten(), reading.top_logprobs.float().exp().flatten())
    head = choose_head(base.head, readings, 40)
    order = head.order.tokens.long()
    assert mass[order].tolist() == sorted(mass.tolist(), reverse=True)[:40]
    assert torch.equal(head.weight, base.head[order.sort().values])
    everything = choose_head(base.head, readings, 1 << 20).order.tokens
    assert len(everything) == int((mass > 0).sum()), "what never occurs has no place in the order"


def test_the_objective_is_cross_entropy() -> None:
    """Value and gradient, against autograd over the whole vocabulary; tokens left out have none."""
    generator = torch.Generator().manual_seed(0)
    output = torch.randn(700, 16, generator=generator, requires_grad=True)
    weight = torch.randn(50, 16, generator=generator)
    logprobs, ids = torch.randn(700, 50, generator=generator).log_softmax(-1).topk(TOP)
    place = torch.full((60,), -1)
    place[10:] = torch.arange(50)  # tokens 0 to 9 are left out
    tokens = ids + torch.randint(0, 11, ids.shape, generator=generator)
    head = Head(weight, place, TokenOrder(torch.arange(10, 60).int(), 60), 1.0)
    loss = cross_entropy(output, head, tokens.int(), logprobs.half())
    (found,) = torch.autograd.grad(loss, output)
    p = torch.where(tokens >= 10, logprobs.half().float().exp(), 0.0)
    ranked = (output @ weight.T).log_softmax(-1).gather(1, (tokens - 10).clamp_min(0))
    want = -(p * ranked).sum(-1).mean()
    torch.testing.assert_close(loss, want)
    torch.testing.assert_close(found, torch.autograd.grad(want, output)[0])


def test_the_head_keeps_what_the_base_says(base, readings) -> None:
    head = choose_head(base.head, readings, 32)
    said = {int(token) for reading in readings for token in reading.top_ids[:, 0]}
    kept = {int(token) for token in (head.place >= 0).nonzero()}
    assert len(kept) == 32
    assert len(kept & said) > 16
    assert 0.1 < head.coverage < 1
    for token in kept:
        assert torch.equal(head.weight[head.place[token]], base.head[token].bfloat16())


def test_readings_are_what_the_base_says(base, samples, readings) -> None:
    assert len(readings) == len(samples)
    for sample, reading in zip(samples, readings, strict=True):
        assert reading.ids.tolist() == sample.prompt + sample.completion
        assert reading.start == len(sample.prompt)
        hidden, normed = base.read(reading.ids[None])
        torch.testing.assert_close(reading.hidden, hidden[0], rtol=0.05, atol=0.05)
        logprobs = (normed[0] @ base.head.T).float().log_softmax(-1)
        best = logprobs.gather(1, reading.top_ids.long())
        torch.testing.assert_close(best, reading.top_logprobs.float(), rtol=0.02, atol=0.1)


def test_readings_are_kept(base, samples, tmp_path, monkeypatch) -> None:
    cache = HiddenCache(tmp_path, "kept")
    cache.fill(base, samples[:3], quiet)
    monkeypatch.setattr(base, "read", None)
    cache.fill(base, samples[:3], quiet)
    assert len(cache.load()) == 3
    with pytest.raises(TypeError):
        cache.fill(base, samples[:4], quiet)


def test_batches_hold_every_sequence_once(readings) -> None:
    groups = list(epoch(readings, 128, seed=1))
    assert len(groups) > 3
    found = [id(reading) for group in groups for reading in group]
    assert sorted(found) == sorted(id(reading) for reading in readings)
    assert list(epoch(readings, 128, seed=2)) != groups
    batch = Batch.of(groups[0])
    for row, reading in enumerate(groups[0]):
        used = batch.used[row]
        assert int(used.sum()) == len(reading.ids) - reading.start
        assert batch.next_ids[row][used].tolist() == reading.ids[reading.start :].tolist()


def test_text_is_cut_evenly() -> None:
    pieces = text_samples([list(range(100)), list(range(200, 250))], 10, 5)
    assert [piece.completion[0] for piece in pieces] == [0, 30, 60, 90, 220]
    assert all(len(piece.completion) == 10 and not piece.prompt for piece in pieces)


def test_a_pass_sees_its_chain() -> None:
    """Pass 3 at position 5: pass 1 up to 3, pass 2 at 4, itself at 5."""
    mask = pass_mask(8, 3, torch.device("cpu")).view(8, 3, 8)
    assert [mask[5, i].nonzero().flatten().tolist() for i in range(3)] == [[0, 1, 2, 3], [4], [5]]
