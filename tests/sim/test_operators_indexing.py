"""Gathers, scatters, concatenation and sequences against torch on the CPU."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from sim_parity import parity

DTYPES = [torch.float32, torch.bfloat16, torch.int64, torch.int32, torch.int8, torch.bool]


def _values(shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> torch.Tensor:
    generator = torch.Generator().manual_seed(6)
    return torch.randint(-9, 9, shape, generator=generator).to(dtype)


ROWS = torch.tensor([2, 0, 2, 3])
MASK = torch.tensor([True, False, True, True])

READS: list[Callable[..., Any]] = [
    lambda x, i, m: x[i],
    lambda x, i, m: x[i.int()],
    lambda x, i, m: x[:, i],
    lambda x, i, m: x[i, i],
    lambda x, i, m: x[i[:, None], i[:2]],
    lambda x, i, m: x[i, :, i],
    lambda x, i, m: x[:, i, i],
    lambda x, i, m: x[m],
    lambda x, i, m: x[:, :4][:, m],
    lambda x, i, m: x[i[:0]],
    lambda x, i, m: x[-1, i],
    lambda x, i, m: x[i - 1],
    lambda x, i, m: x[..., i],
]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("number", range(len(READS)))
def test_reading_by_index(number: int, dtype: torch.dtype) -> None:
    parity(READS[number], _values((4, 5, 4), dtype), ROWS, MASK)


def _put(key: Callable[..., Any], accumulate: bool = False) -> Callable[..., Any]:
    def function(x: Any, i: Any, m: Any, v: Any) -> Any:
        chosen = key(i, m)
        shape = x[chosen].shape
        return x.index_put_(
            chosen if isinstance(chosen, tuple) else (chosen,), v.expand(shape), accumulate
        )

    return function


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_writing_by_index(dtype: torch.dtype) -> None:
    x, values = _values((4, 5, 4), dtype), _values((4,), dtype)
    rows = torch.tensor([2, 0, 3])
    parity(_put(lambda i, m: i), x, rows, MASK, values, operator="IndexPutImpl")
    parity(_put(lambda i, m: (i, i)), x, rows, MASK, values)
    parity(_put(lambda i, m: m), x, rows, MASK, values)

    def slices(x: Any, i: Any, v: Any) -> None:
        x[:, i] = v
        x[i, :, i] = v[:1]
        x[1:, i.int()] = v

    parity(slices, x, rows, values)
    parity(slices, x.transpose(0, 2), rows, _values((4,), dtype))


def test_accumulating() -> None:
    x, values = _values((4, 5)), _values((4, 5))
    parity(lambda t, i, v: t.index_put_((i,), v, True), x, ROWS, values, operator="IndexPutImpl")
    parity(lambda t, i, v: t.index_put_((i, i), v[:, 0], True), x, ROWS, values)
    parity(lambda t, i, v: t.t().index_put_((i,), v.t()[:4, :4], True), x, ROWS, values)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64], ids=str)
@pytest.mark.parametrize("index_dtype", [torch.int64, torch.int32], ids=str)
def test_index_select(dtype: torch.dtype, index_dtype: torch.dtype) -> None:
    x, rows = _values((4, 5, 6), dtype), ROWS.to(index_dtype)
    for dim in (0, 1, -1):
        parity(lambda t, i: t.index_select(dim, i), x, rows, operator="IndexSelect")  # noqa: B023
    parity(lambda t, i: t.t().index_select(0, i), x[0], rows)


@pytest.mark.parametrize("index_dtype", [torch.int64, torch.int32], ids=str)
def test_embedding(index_dtype: torch.dtype) -> None:
    table = _values((11, 8), torch.bfloat16)
    index = torch.tensor([[3, 10], [0, 3]], dtype=index_dtype)
    parity(lambda t, i: torch.nn.functional.embedding(i, t), table, index, operator="Embedding")


def test_gathering() -> None:
    x, index = _values((3, 7)), torch.tensor([[0, 6], [2, 2], [5, 1]])
    parity(lambda t, i: t.gather(1, i), x, index, operator="Gather")
    parity(lambda t, i: t.gather(0, i % 3), x, index)
    parity(lambda t, i: torch.take_along_dim(t, i, 1), x, index)
    parity(lambda t, i: t.take(i), x, index, operator="Take")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64], ids=str)
def test_scattering(dtype: torch.dtype) -> None:
    x, index = _values((3, 7), dtype), torch.tensor([[0, 6], [2, 1], [5, 1]])
    source = _values((3, 2), dtype)
    parity(lambda t, i, s: t.scatter_(1, i, s), x, index, source, operator="InplaceScatter")
    parity(lambda t, i, s: t.scatter(1, i, s), x, index, source)
    parity(lambda t, i: t.scatter_(1, i, 3), x, index, operator="InplaceScatterValue")
    parity(lambda t, i: t.scatter(1, i, 3), x, index)
    parity(lambda t, i, s: t.scatter_add_(1, i, s), x, index, source, operator="ScatterAdd")
    parity(lambda t, i, s: t.scatter_add(1, i, s), x, index, source)
    parity(lambda t, i: t.index_fill_(1, i[0], 4), x, index)


def test_scattering_out_of_place() -> None:
    x, index, source = _values((3, 7)), torch.tensor([[0], [2], [5]]), _values((3, 1))
    parity(
        lambda t, i, s, o: torch.scatter(t, 1, i, s, out=o),
        *(x, index, source, torch.empty(3, 7)),
        operator="Scatter",
    )
    parity(
        lambda t, i, o: torch.scatter(t, 1, i, 2.5, out=o),
        *(x, index, torch.empty(3, 7)),
        operator="ScatterValue",
    )


def test_copying_and_adding_rows() -> None:
    x, source, rows = _values((4, 5)), _values((3, 5)), torch.tensor([2, 0, 3])
    parity(lambda t, i, s: t.index_copy_(0, i, s), x, rows, source, operator="InplaceIndexCopy")
    parity(lambda t, i, s: t.index_copy(0, i, s), x, rows, source, operator="IndexCopy")
    parity(lambda t, i, s: t.index_add_(0, i, s), x, rows, source)
    parity(lambda t, i, s: t.index_add(0, i, s, alpha=2), x, rows, source)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64, torch.bool], ids=str)
def test_joining(dtype: torch.dtype) -> None:
    x, y = _values((3, 4), dtype), _values((3, 2), dtype)
    parity(lambda a, b: torch.cat((a, b), 1), x, y, operator="Cat")
    parity(lambda a, b: torch.cat((a.t(), b.t())), x, y)
    parity(lambda a: torch.stack((a, a), 1), x, operator="Stack")
    parity(lambda a: a.repeat(2, 3), x, operator="Repeat")
    parity(lambda a: a.flip(0, 1), x, operator="Flip")
    parity(lambda a: a.roll(2, 1), x, operator="Roll")


def test_repeating_elements() -> None:
    x, counts = _values((3, 4)), torch.tensor([2, 0, 3])
    parity(lambda t: t.repeat_interleave(3), x)
    parity(lambda t, n: t[0, :3].repeat_interleave(n), x, counts, operator="RepeatInterleave")
    parity(lambda t: t.repeat_interleave(3, 1), x)
    parity(lambda t, n: t.repeat_interleave(n, 0), x, counts)
    parity(lambda t, n: t.repeat_interleave(n, 0, output_size=5), x, counts)
    parity(lambda n: torch.repeat_interleave(n, output_size=5), counts)


def test_padding() -> None:
    x = _values((3, 4))
    parity(lambda t: torch.nn.functional.pad(t, (1, 2), value=7.0), x, operator="ConstantPadNd")
    parity(lambda t: torch.nn.functional.pad(t, (0, 0, 2, 1)), x.long())


@pytest.mark.parametrize("dtype", [torch.float32, torch.int64, torch.int32], ids=str)
def test_sequences(dtype: torch.dtype) -> None:
    def on(function: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        return lambda like: function(dtype=dtype, device=like.device)

    here = torch.zeros(1)
    parity(on(lambda **kw: torch.arange(9, **kw)), here, operator="Arange")
    parity(on(lambda **kw: torch.arange(2, 9, 3, **kw)), here)
    parity(on(lambda **kw: torch.eye(3, 4, **kw)), here, operator="Eye")
    if dtype == torch.float32:
        parity(on(lambda **kw: torch.linspace(0, 1, 7, **kw)), here, operator="Linspace")
        parity(on(lambda **kw: torch.arange(0, 1, 0.25, **kw)), here)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.range is old, and includes its end
        parity(on(lambda **kw: torch.range(1, 7, 2, **kw)), here, operator="Range")


def test_results_of_unknown_shape() -> None:
    x = torch.tensor([[0, 1, 0], [2, 0, 3]])
    parity(torch.nonzero, x, operator="Nonzero")
    parity(lambda t: t.nonzero(as_tuple=True), x.float())
    parity(torch.nonzero, torch.zeros(3))
    parity(lambda t: t.masked_select(t > 0), x, operator="MaskedSelect")
    parity(lambda t, s: t.masked_scatter_(t > 0, s), x, x + 5, operator="InplaceMaskedScatter")


def test_bucketing() -> None:
    edges, x = torch.tensor([1.0, 3.0, 5.0]), torch.tensor([0.5, 3.0, 9.0, 1.0])
    parity(torch.searchsorted, edges, x, operator="SearchSorted")
    parity(lambda e, t: torch.searchsorted(e, t, right=True), edges, x)
    parity(lambda e, t: torch.bucketize(t, e, right=True), edges, x)
    parity(lambda t: torch.nn.functional.one_hot(t, 5), torch.tensor([3, 0, 4]), operator="OneHot")
    parity(lambda t: torch.isin(t, 3.0), x, operator="IsInTensorScalar")
