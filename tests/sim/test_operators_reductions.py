"""Reductions, scans, sorting and softmax against torch on the CPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from sim_parity import parity

FLOATS = [torch.float32, torch.bfloat16, torch.float16]


def _normal(shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> torch.Tensor:
    generator = torch.Generator().manual_seed(4)
    return torch.randn(shape, generator=generator).to(dtype)


def _distinct(shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Values without ties, so that positions are determined."""
    generator = torch.Generator().manual_seed(5)
    count = torch.Size(shape).numel()
    return torch.randperm(count, generator=generator).to(dtype).reshape(shape) - count // 2


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("shape", [(7,), (3, 17), (2, 3, 5)])
def test_sums(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    x = _normal(shape, dtype)
    parity(torch.sum, x, operator="ReduceSum")
    parity(torch.mean, x, operator="Mean")
    for keepdim in (False, True):
        parity(lambda t: t.sum(-1, keepdim=keepdim), x)  # noqa: B023
        parity(lambda t: t.mean(0, keepdim=keepdim), x)  # noqa: B023
    parity(lambda t: t.mean(-1, dtype=torch.float32), x)
    parity(lambda t: t.float().logsumexp(-1), x, operator="LogSumExp")
    parity(lambda t: t.float().std(-1), x, operator="Std")
    parity(lambda t: torch.var_mean(t.float(), -1), x, operator="VarMean")


def test_sums_of_integers() -> None:
    x = torch.arange(12).reshape(3, 4)
    parity(torch.sum, x, operator="ReduceSum")
    parity(lambda t: t.sum(0), x.int())
    parity(lambda t: (t > 5).sum(-1), x)
    parity(lambda t: t.sum(-1, dtype=torch.float32), x)
    parity(lambda t: t.float().prod(), x + 1, operator="Prod")
    parity(lambda t: t.float().prod(-1), x + 1, operator="ProdDim")


def test_truth() -> None:
    x = torch.arange(12).reshape(3, 4) > 5
    parity(torch.any, x, operator="Any")
    parity(torch.all, x, operator="All")
    parity(lambda t: t.any(-1), x)
    parity(lambda t: t.all(0, keepdim=True), x)
    parity(lambda t: t.any(), torch.zeros(3))


@pytest.mark.parametrize("dtype", [*FLOATS, torch.int64, torch.int32], ids=str)
def test_extremes(dtype: torch.dtype) -> None:
    x = _distinct((3, 17), dtype)
    parity(torch.max, x, operator="Max")
    parity(torch.min, x, operator="Min")
    parity(lambda t: tuple(t.max(-1)), x, operator="MaxDim")
    parity(lambda t: tuple(t.min(0, keepdim=True)), x, operator="MinDim")
    parity(lambda t: t.amax(-1), x, operator="Amax")
    parity(lambda t: t.amin((0, 1)), x, operator="Amin")
    parity(lambda t: t.argmax(-1), x, operator="ArgMax")
    parity(lambda t: t.argmax(), x)
    parity(lambda t: t.argmin(0, keepdim=True), x, operator="ArgMin")


@pytest.mark.parametrize("dtype", [*FLOATS, torch.int64, torch.int32, torch.bool], ids=str)
def test_scans(dtype: torch.dtype) -> None:
    x = _distinct((3, 5)).to(dtype)
    parity(lambda t: t.cumsum(-1), x, operator="Cumsum")
    parity(lambda t: t.cumsum(0), x)
    if dtype == torch.float32:
        parity(lambda t: t.cumprod(-1), x, operator="Cumprod")
        parity(lambda t: tuple(t.cummax(-1)), x, operator="Cummax")


@pytest.mark.parametrize("dtype", [*FLOATS, torch.int64, torch.int32], ids=str)
@pytest.mark.parametrize("descending", [False, True])
def test_sorting(dtype: torch.dtype, descending: bool) -> None:
    x = _distinct((4, 11), dtype)
    parity(lambda t: tuple(t.sort(-1, descending)), x, operator="Sort")
    parity(lambda t: tuple(t.sort(dim=0, descending=descending, stable=True)), x)
    parity(lambda t: t.argsort(-1, descending), x)
    parity(lambda t: tuple(t.topk(3, -1, descending)), x)


def test_topk_runs_as_one_operator() -> None:
    from sim_parity import launches

    before = launches().copy()
    torch.randn(4, 32).npu().topk(5).values.cpu()
    ran = launches() - before
    assert ran["aclnnTopkV2"]


def test_order_statistics() -> None:
    x = _distinct((3, 11))
    parity(torch.median, x, operator="Median")
    parity(lambda t: tuple(t.median(-1)), x, operator="MedianDim")
    parity(lambda t: tuple(t.kthvalue(3, -1)), x, operator="Kthvalue")


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("dim", [-1, 0])
def test_softmax(dtype: torch.dtype, dim: int) -> None:
    x = _normal((5, 33), dtype)
    parity(lambda t: t.softmax(dim), x, operator="Softmax")
    parity(lambda t: t.log_softmax(dim), x, operator="LogSoftmax")
    parity(lambda t: t.softmax(dim, dtype=torch.float32), x)


def test_masked_rows_of_softmax_are_nan_as_in_torch() -> None:
    x = _normal((2, 5))
    x[0] = -torch.inf
    parity(lambda t: t.softmax(-1), x)


def test_counting() -> None:
    x = torch.tensor([3, 1, 3, 0, 7])
    parity(lambda t: torch.bincount(t, minlength=9), x, operator="Bincount")

    def unique(t: torch.Tensor) -> Any:
        return torch.unique(t, sorted=True, return_inverse=True, return_counts=True)

    parity(unique, x, operator="Unique2")
