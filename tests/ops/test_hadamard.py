"""``hadamard``: orthogonal, in the order of checkpoints, and what it refuses."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from implementations import threads

from ascend_plugin.ops.hadamard import hadamard, known_orders, operator
from ascend_plugin.ops.hadamard.matrices import base_for

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
TOLERANCES = {torch.bfloat16: 3e-3, torch.float16: 4e-4, torch.float32: 1e-6}


def _matrix(block: int, base: torch.Tensor | None) -> torch.Tensor:
    """Return the float64 ``[block, block]`` matrix, by Kronecker products."""
    matrix = torch.ones(1, 1) if base is None else base
    matrix = matrix.double()
    while matrix.shape[0] < block:
        two = torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64)
        matrix = torch.kron(matrix, two)
    return matrix


def _oracle(x: torch.Tensor, block: int, base: torch.Tensor | None) -> torch.Tensor:
    parts = x.double().unflatten(-1, (-1, block))
    return (parts @ _matrix(block, base).T).flatten(-2) / block**0.5


@given(
    m=st.integers(0, 5),
    blocks=st.integers(1, 3),
    order=st.sampled_from((1, 1, 12, 20, 28, 36)),
    power=st.integers(0, 7),
    dtype=st.sampled_from(DTYPES),
    strided=st.booleans(),
    seed=st.integers(0, 2**16),
)
@settings(max_examples=120)
def test_any_call_equals_the_matrix(
    implementation: str,
    m: int,
    blocks: int,
    order: int,
    power: int,
    dtype: torch.dtype,
    strided: bool,
    seed: int,
) -> None:
    generator = torch.Generator().manual_seed(seed)
    block = order << power
    d = block * blocks
    wide = torch.full((m, d + 7 * strided), torch.nan, dtype=dtype)
    wide[:, :d] = torch.randn(m, d, generator=generator).to(dtype)
    x = wide[:, :d]
    result = hadamard(x, block)
    expected = _oracle(x, block, base_for(block))
    assert (result.dtype, result.shape) == (dtype, x.shape)
    error = (result.double() - expected).norm() / max(float(expected.norm()), 1e-30)
    assert float(error) <= TOLERANCES[dtype]


@pytest.mark.parametrize("order", known_orders())
def test_known_matrices_are_hadamards(order: int) -> None:
    base = base_for(order)
    assert base is not None
    # 24 and its like are built from a smaller one and a power of two.
    matrix = _matrix(order, base)
    assert bool((matrix.abs() == 1).all())
    assert torch.equal(matrix @ matrix.T, torch.eye(order, dtype=torch.float64) * order)


def test_leading_dimensions_and_a_given_base(implementation: str) -> None:
    base = torch.linalg.qr(torch.randn(5, 5))[0].contiguous()
    x = torch.randn(2, 3, 40)
    result = hadamard(x, 20, base, normalise=False)
    expected = (x.double().unflatten(-1, (2, 20)) @ _matrix(20, base).T).flatten(-2)
    torch.testing.assert_close(result.double(), expected, rtol=1e-5, atol=1e-5)


def test_twice_is_the_identity_for_powers_of_two(implementation: str) -> None:
    x = torch.randn(4, 1024)
    torch.testing.assert_close(hadamard(hadamard(x)), x, rtol=1e-5, atol=1e-5)


def test_compressed_tensors_has_the_same_order(implementation: str) -> None:
    """The rotation of a checkpoint of llm-compressor, as its library multiplies it."""
    hadamards = pytest.importorskip("compressed_tensors.transform.utils.hadamard")
    for size in (64, 96, 160, 576):
        generator = torch.Generator().manual_seed(size)
        signs = torch.randint(0, 2, (size,), generator=generator, dtype=torch.float32) * 2 - 1
        generator.manual_seed(size)
        theirs = hadamards.random_hadamard_matrix(size, torch.float32, gen=generator)
        base = hadamards._fetch_hadamard_divisor(size, torch.float32)
        found = hadamard(torch.diag(signs), size, base.contiguous(), normalise=False)
        assert torch.equal(found, theirs)  # it multiplies rows, too


def test_threads(implementation: str) -> None:
    x = torch.randn(70, 768)
    alone = hadamard(x)
    with threads(3):
        assert torch.equal(hadamard(x), alone)


@pytest.mark.parametrize(
    "x, options, message",
    [
        (torch.ones(2, 64), {"block": 48}, r"block=48 does not divide the 64 columns of x"),
        (torch.ones(2, 64).int(), {}, r"x has dtype torch.int32; allowed are"),
        (torch.ones(2, 28 * 3), {"block": 14}, r"no Hadamard matrix of size 14 is known here"),
        (torch.ones(2, 64), {"block": 0}, r"block=0 must be at least 1"),
        (
            torch.ones(2, 60),
            {"base": torch.ones(20, 20)},
            r"block=60 is not 20 \(the order of base\) times a power of two",
        ),
        (
            torch.ones(2, 40),
            {"base": torch.ones(20, 20).half()},
            r"base must be a square float32 matrix, got torch.float16 \[20, 20\]",
        ),
        (torch.ones(2, 40), {"base": torch.ones(40, 20)[::2].T}, r"base must be contiguous"),
    ],
)
def test_refusals(x: torch.Tensor, options: dict[str, object], message: str) -> None:
    operator.forget()
    with pytest.raises(ValueError, match=message):
        hadamard(x, **options)


@pytest.mark.parametrize("base", [None, "known"])
def test_opcheck(implementation: str, base: str | None) -> None:
    matrix = base_for(48) if base else None
    torch.library.opcheck(
        torch.ops.ascend_plugin.hadamard.default,
        (torch.randn(3, 96), matrix, 48 if base else 32, 0.5),
    )
