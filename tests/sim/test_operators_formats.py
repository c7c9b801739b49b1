"""Private formats: NZ memory is really tiled, can be read and written, and multiplies."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from sim_parity import assert_close, launches

from ascend_plugin.ops.sim import operators  # noqa: F401  (registers)
from ascend_plugin.ops.sim.arguments import FractalTensor
from ascend_plugin.ops.sim.table import OPERATORS, Call

NZ, ND = 29, 2


@pytest.fixture(autouse=True)
def _internal_formats() -> Iterator[None]:
    torch.npu.config.allow_internal_format = True
    yield
    torch.npu.config.allow_internal_format = False


def _matrix(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.int8], ids=str)
@pytest.mark.parametrize("shape", [(32, 64), (33, 70), (1, 5), (3, 40, 24)])
def test_round_trip(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    import torch_npu

    x = (_matrix(*shape, dtype=torch.float32) * 20).to(dtype)
    tiled = torch_npu.npu_format_cast(x.npu(), NZ)
    assert torch_npu.get_npu_format(tiled) == NZ
    assert torch.equal(torch_npu.npu_format_cast(tiled, ND).cpu(), x)
    assert torch.equal(tiled.cpu(), x)


def test_memory_is_cubes() -> None:
    import torch_npu

    x = torch.arange(32 * 48, dtype=torch.float16).reshape(32, 48)
    tiled = torch_npu.npu_format_cast(x.npu(), NZ)
    raw = torch.empty(32 * 48, dtype=torch.float16)
    source = tiled.untyped_storage().data_ptr()
    import ctypes

    torch.npu.synchronize()
    ctypes.memmove(raw.data_ptr(), source, raw.nbytes)
    cubes = x.reshape(2, 16, 3, 16).permute(2, 0, 1, 3)  # [columns / 16, rows / 16, 16, 16]
    assert torch.equal(raw, cubes.reshape(-1))


def test_tiled_tensors_are_written() -> None:
    import torch_npu

    tiled = torch_npu.npu_format_cast(_matrix(32, 64).npu(), NZ)
    tiled.copy_(torch.ones(32, 64, dtype=torch.bfloat16).npu())
    assert torch.equal(tiled.cpu(), torch.ones(32, 64, dtype=torch.bfloat16))


@pytest.mark.parametrize("transposed", [False, True])
def test_operators_write_tiled_tensors_back(transposed: bool) -> None:
    cubes = torch.full((3, 2, 16, 16), torch.nan)  # of a matrix (20, 40)
    shape = torch.Size((40, 20) if transposed else (20, 40))
    tensor = FractalTensor(cubes, shape, torch.float32, transposed)
    call = Call(OPERATORS["aclnnInplaceFillScalar"], [tensor, 3.0])
    call.run()
    assert torch.equal(tensor.load(), torch.full(shape, 3.0))
    assert int(cubes.count_nonzero()) == 20 * 40
    before = cubes.clone()
    Call(OPERATORS["aclnnNeg"], [tensor, torch.empty(shape)]).run()  # reads only
    assert torch.equal(cubes, before)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("tokens", [1, 7])
def test_products_with_tiled_weights(dtype: torch.dtype, tokens: int) -> None:
    import torch_npu

    x, weight = _matrix(tokens, 96, dtype=dtype), _matrix(80, 96, dtype=dtype)
    bias = _matrix(80, dtype=dtype)
    tiled = torch_npu.npu_format_cast(weight.npu(), NZ)
    linear = torch.nn.functional.linear
    before = launches().copy()
    assert_close(linear(x.npu(), tiled).cpu(), linear(x, weight), None)
    assert_close(torch.matmul(x.npu(), tiled.t()).cpu(), x @ weight.t(), None)
    assert_close(linear(x.npu(), tiled, bias.npu()).cpu(), linear(x, weight, bias), 2**-6)
    across = torch_npu.npu_format_cast(weight.t().contiguous().npu(), NZ)
    assert_close(torch.matmul(x.npu(), across).cpu(), x @ weight.t(), None)
    assert (launches() - before)["aclnnMatmulWeightNz"]


def test_a_replay_reads_the_weights_of_its_time() -> None:
    import torch_npu

    x = _matrix(2, 32).npu()
    weight = torch_npu.npu_format_cast(_matrix(16, 32).npu(), NZ)
    torch.nn.functional.linear(x, weight)
    graph = torch.npu.NPUGraph()
    with torch.npu.graph(graph):
        result = torch.nn.functional.linear(x, weight)
    weight.copy_(torch.zeros(16, 32, dtype=torch.bfloat16).npu())
    graph.replay()
    assert not result.cpu().any()
