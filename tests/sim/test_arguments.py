"""Decoding of the runtime's objects, and what wrong signatures say."""

from __future__ import annotations

import ctypes

import pytest
import torch

from ascend_plugin.ops.sim.arguments import ArgumentError, Decoder
from ascend_plugin.ops.sim.runtime import Runtime, library


@pytest.fixture(scope="module")
def decoder() -> Decoder:
    torch.npu.set_device(0)
    runtime = Runtime()
    return Decoder(runtime.object_kind, runtime.bytes_left)


def _create(name: str, *arguments: object) -> int:
    function = getattr(library(), name)
    function.restype = ctypes.c_void_p
    pointer = function(*arguments)
    assert pointer
    return int(pointer)


def _tensor(tensor: torch.Tensor, dtype: int = 0, form: int = 2) -> int:
    rank = tensor.dim()
    dims, strides = (
        (ctypes.c_int64 * rank)(*tensor.shape),
        (ctypes.c_int64 * rank)(*tensor.stride()),
    )
    count = ctypes.c_uint64(rank)
    data = ctypes.c_void_p(tensor.untyped_storage().data_ptr())
    offset = ctypes.c_int64(tensor.storage_offset())
    return _create("aclCreateTensor", dims, count, dtype, strides, offset, form, dims, count, data)


def test_views(decoder: Decoder) -> None:
    x = torch.arange(24.0).reshape(4, 6).npu()
    torch.npu.synchronize()
    view = x[1:, ::2].t()
    decoded = decoder.tensor(_tensor(view))
    assert isinstance(decoded, torch.Tensor)
    assert torch.equal(decoded, view.cpu())
    decoded.zero_()
    assert not x[1:, ::2].cpu().any()
    assert decoder.tensor(_tensor(view)) is decoded  # kept


def test_scalars_and_arrays(decoder: Decoder) -> None:
    value = ctypes.c_double(0.1)
    pointer = _create("aclCreateScalar", ctypes.byref(value), 11)
    numbers = (ctypes.c_int64 * 3)(5, -1, 7)
    array = _create("aclCreateIntArray", numbers, ctypes.c_uint64(3))
    bools = (ctypes.c_bool * 2)(True, False)
    flags = _create("aclCreateBoolArray", bools, ctypes.c_uint64(2))
    assert decoder.decode("SABicTS", [pointer, array, flags, 4, b"half", None, 0]) == [
        *(0.1, [5, -1, 7], [True, False], 4, b"half", None, None)
    ]
    half = (ctypes.c_uint16 * 1)(0x3FC0)  # 1.5 in bfloat16
    assert decoder.decode("S", [_create("aclCreateScalar", half, 27)]) == [1.5]


def test_a_wrong_signature_is_an_error(decoder: Decoder) -> None:
    scalar = _create("aclCreateScalar", ctypes.byref(ctypes.c_double(1)), 11)
    x = torch.ones(3).npu()
    with pytest.raises(ArgumentError, match=r"argument 1 \(T\): expected a tensor .* is scalar"):
        decoder.decode("TT", [_tensor(x), scalar])
    with pytest.raises(ArgumentError, match=r"argument 0 \(A\): .* no live object"):
        decoder.decode("A", [12345])


def test_memory_of_the_host_is_an_error(decoder: Decoder) -> None:
    with pytest.raises(ArgumentError, match="Copy host tensors to the device first"):
        decoder.tensor(_tensor(torch.ones(3)))


def test_a_view_beyond_its_allocation_is_an_error(decoder: Decoder) -> None:
    pointer = ctypes.c_void_p()
    assert library().aclrtMalloc(ctypes.byref(pointer), ctypes.c_size_t(512), 0) == 0
    dims, strides = (ctypes.c_int64 * 1)(512), (ctypes.c_int64 * 1)(1)
    one = ctypes.c_uint64(1)
    tensor = _create(
        *("aclCreateTensor", dims, one, 0, strides, ctypes.c_int64(0), 2, dims, one, pointer)
    )
    with pytest.raises(ArgumentError, match="2048 bytes at"):
        decoder.tensor(tensor)
    dims[0] = 4
    small = _create(
        *("aclCreateTensor", dims, one, 0, strides, ctypes.c_int64(0), 2, dims, one, pointer)
    )
    assert decoder.tensor(small) is not None
    assert library().aclrtFree(pointer) == 0
    with pytest.raises(ArgumentError, match="holds 0"):
        decoder.tensor(small)


def test_unknown_types_and_views_of_private_formats(decoder: Decoder) -> None:
    x = torch.ones(32, 32).npu()
    with pytest.raises(ArgumentError, match="aclDataType 34 is not simulated"):
        decoder.tensor(_tensor(x, dtype=34))
    with pytest.raises(ArgumentError, match="of an NZ tensor stored as"):
        decoder.tensor(_tensor(x, form=29))
