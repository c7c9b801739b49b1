"""Random operators: repeatable, independent, of the right distribution."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from sim_parity import launches

DRAWS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "InplaceUniform": lambda x: x.uniform_(-1, 3),
    "InplaceNormal": lambda x: x.normal_(2, 3),
    "InplaceRandom": lambda x: x.random_(2, 9),
    "InplaceBernoulli": lambda x: x.bernoulli_(0.3),
    "Multinomial": lambda x: torch.multinomial(x.fill_(1.0).view(-1)[:512], 100),
    "Randperm": lambda x: torch.randperm(100, device=x.device),
}


@pytest.mark.parametrize("operator", DRAWS)
def test_same_seed_same_numbers(operator: str) -> None:
    def draw() -> torch.Tensor:
        return DRAWS[operator](torch.empty(40, 50, device="npu")).cpu()

    before = launches()[f"aclnn{operator}"]
    torch.npu.manual_seed(5)
    first, second = draw(), draw()
    torch.npu.manual_seed(5)
    assert torch.equal(draw(), first)
    assert not torch.equal(first, second)
    assert launches()[f"aclnn{operator}"] == before + 3


def test_moments() -> None:
    x = torch.empty(100_000, device="npu")
    uniform = x.uniform_(-1, 3).cpu()
    assert -1 <= uniform.min() < -0.99
    assert 2.99 < uniform.max() < 3
    assert abs(uniform.mean() - 1) < 0.02
    normal = x.normal_(2, 3).cpu()
    assert abs(normal.mean() - 2) < 0.05
    assert abs(normal.std() - 3) < 0.05
    whole = x.random_(2, 9).cpu()
    assert torch.equal(whole.unique(), torch.arange(2.0, 9.0))
    assert abs(x.bernoulli_(0.3).cpu().mean() - 0.3) < 0.01
    assert abs(x.exponential_(2.0).cpu().mean() - 0.5) < 0.01
    shuffled = torch.randperm(100, device="npu").cpu()
    assert torch.equal(shuffled.sort().values, torch.arange(100))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_uniform_never_reaches_its_end(dtype: torch.dtype) -> None:
    assert torch.empty(100_000, dtype=dtype, device="npu").uniform_().cpu().max() < 1


def test_random_numbers_do_not_touch_the_generator_of_the_cpu() -> None:
    state = torch.random.get_rng_state()
    torch.empty(10, device="npu").normal_().cpu()
    assert torch.equal(torch.random.get_rng_state(), state)


def test_each_replay_draws_other_numbers() -> None:
    x = torch.empty(100, device="npu").uniform_()
    graph = torch.npu.NPUGraph()
    with torch.npu.graph(graph):
        x.uniform_()
    graph.replay()
    first = x.cpu()
    graph.replay()
    assert not torch.equal(x.cpu(), first)
    assert launches()["aclnnInplaceUniformTensor"]


@pytest.mark.parametrize(
    ("operator", "draw"),
    [
        ("InplaceNormalTensor", lambda x: x.normal_(2, 3)),
        ("InplaceRandomTensor", lambda x: x.random_(2, 9)),
        ("MultinomialTensor", lambda x: x.copy_(torch.multinomial(x.fill_(1.0), 100))),
    ],
)
def test_operators_of_captured_graphs(
    operator: str, draw: Callable[[torch.Tensor], torch.Tensor]
) -> None:
    x = torch.zeros(100, device="npu")
    draw(x)
    graph = torch.npu.NPUGraph()
    with torch.npu.graph(graph):
        draw(x)
    graph.replay()
    first = x.cpu()
    graph.replay()
    assert not torch.equal(x.cpu(), first)
    assert launches()[f"aclnn{operator}"] == 2


def test_probabilities_per_element() -> None:
    chances = torch.tensor([0.0, 1.0]).repeat(50).npu()
    drawn = torch.empty(100, device="npu").bernoulli_(chances).cpu()
    assert torch.equal(drawn, chances.cpu())
    assert launches()["aclnnInplaceBernoulliTensor"]
