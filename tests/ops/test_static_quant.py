"""Activations into int8 with given numbers."""

from __future__ import annotations

import pytest
import torch

from ascend_plugin.ops.static_quant import static_quant

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def _numbers(factor: float, zero: int, dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    return [torch.tensor([factor], dtype=dtype), torch.tensor([zero], dtype=dtype)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(0, 8), (1, 1), (7, 33)], ids=str)
def test_values(shape: tuple[int, int], dtype: torch.dtype) -> None:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    got = static_quant(x, *_numbers(40.0, -7))
    want = (x.double() * 40.0 - 7).round().clamp(-128, 127)
    assert got.dtype == torch.int8
    assert got.shape == x.shape
    # float32 may round a product that lies next to a half the other way.
    assert ((got.double() - want).abs() <= 1).all()
    assert (got == want).double().mean() > 0.99 or not x.numel()


def test_rounds_to_even_and_saturates() -> None:
    x = torch.tensor([[0.25, 0.75, 1.25, -0.25, -0.75, 1e9, -1e9, 0.0]])
    assert static_quant(x, *_numbers(2.0, 3)).tolist() == [[4, 4, 6, 2, 2, 127, -128, 3]]


def test_rows_may_lie_apart() -> None:
    x = torch.randn(5, 64)
    whole = static_quant(x, *_numbers(30.0, 0))
    assert torch.equal(static_quant(x[:, 16:48], *_numbers(30.0, 0)), whole[:, 16:48])


def test_opcheck() -> None:
    arguments = (torch.randn(3, 16), *_numbers(20.0, 5))
    torch.library.opcheck(torch.ops.ascend_plugin.static_quant.default, arguments)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ((torch.zeros(3), *_numbers(1.0, 0)), r"x must be \[rows, columns\]"),
        ((torch.zeros(3, 4).t(), *_numbers(1.0, 0)), "x must be contiguous in its last"),
        ((torch.zeros(3, 4).int(), *_numbers(1.0, 0)), "x has dtype torch.int32"),
        ((torch.zeros(3, 4), torch.ones(2), torch.zeros(1)), r"factor must be .* \[1\], got"),
        ((torch.zeros(3, 4), torch.ones(1), torch.zeros(1).int()), "zero must be float32"),
    ],
)
def test_refusals(arguments: tuple[torch.Tensor, ...], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        static_quant(*arguments)
