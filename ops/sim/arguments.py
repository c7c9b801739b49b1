"""Arguments of aclnn operators: the runtime's objects decoded into torch tensors and Python values.

A signature is one letter per argument, in the order of the C call:

======  ==================================  ===============================================
letter  C type                              decoded
======  ==================================  ===============================================
``T``   ``aclTensor *``                     ``torch.Tensor`` over device memory,
                                            :class:`FractalTensor` in NZ format, or None
``R``   ``aclTensor *``                     :class:`ResizedTensor`: an output whose shape the
                                            operator finds out
``L``   ``aclTensorList *``                 list of what ``T`` gives, or None
``S``   ``aclScalar *``                     bool, int, float, complex, or None
``A``   ``aclIntArray *``                   list of int, or None
``F``   ``aclFloatArray *``                 list of float, or None
``B``   ``aclBoolArray *``                  list of bool, or None
``V``   ``aclScalarList *``                 list of what ``S`` gives, or None
``i``   ``int64_t`` (or ``uint64_t``)       int
``e``   ``int32_t``, ``aclDataType``        int
``h``   ``int8_t`` (cube math type)         int
``b``   ``bool``                            bool
``d``   ``double``                          float
``f``   ``float``                           float
``c``   ``const char *``                    bytes, or None
======  ==================================  ===============================================

Structs are those of ``csrc``; torch_npu decides the C types (``EXEC_NPU_CMD`` converts
``at::Scalar`` to ``aclScalar *``, ``IntArrayRef`` to ``aclIntArray *``, ``ScalarType`` to
``aclDataType``).
"""

from __future__ import annotations

import ctypes
import math
import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

#: ``aclFormat`` of cubes of 16 rows by 32 bytes: columns of cubes one after the other.
FRACTAL_NZ = 29

#: ``aclDataType`` of torch's types.
DTYPES: dict[int, torch.dtype] = {
    0: torch.float32,
    1: torch.float16,
    2: torch.int8,
    3: torch.int32,
    4: torch.uint8,
    6: torch.int16,
    7: torch.uint16,
    8: torch.uint32,
    9: torch.int64,
    10: torch.uint64,
    11: torch.float64,
    12: torch.bool,
    16: torch.complex64,
    17: torch.complex128,
    27: torch.bfloat16,
    35: torch.float8_e5m2,
    36: torch.float8_e4m3fn,
}

_C_TYPES: dict[str, Any] = {
    **dict.fromkeys("TRLSAFBV", ctypes.c_void_p),
    "i": ctypes.c_int64,
    "e": ctypes.c_int32,
    "h": ctypes.c_int8,
    "b": ctypes.c_bool,
    "d": ctypes.c_double,
    "f": ctypes.c_float,
    "c": ctypes.c_char_p,
}

# aclTensor: magic, nd, dims[16], strides[16], offset, dtype, format, nsd, sdims[16], data.
_TENSOR = struct.Struct("<54qQ")
_DIMS, _STRIDES, _OFFSET, _STORAGE_DIMS = 2, 18, 34, 38
_DATA, _DATA_AT = struct.Struct("<Q"), _TENSOR.size - 8
_SCALAR = struct.Struct("<2q16s")
_ARRAY = struct.Struct("<2qQ")

#: Kinds of the runtime's objects (``sim_object_kind``).
_KINDS = {1: "tensor", 2: "scalar", 3: "int array", 4: "float array", 5: "bool array"}
_KINDS |= {6: "tensor list", 7: "scalar list"}
_TENSOR_KIND, _SCALAR_KIND = 1, 2

_SCALAR_FORMATS = {0: "f", 1: "e", 2: "b", 3: "i", 4: "B", 6: "h", 7: "H", 8: "I", 9: "q"}
_SCALAR_FORMATS |= {10: "Q", 11: "d", 12: "?"}
_BFLOAT16, _COMPLEX64, _COMPLEX128 = 27, 16, 17

#: Decoded tensors that are kept: a decode step repeats its addresses and shapes.
_MAX_CACHED = 8192


class ArgumentError(Exception):
    """An argument is not what the operator's signature says, or lies outside device memory."""


@dataclass(frozen=True, slots=True)
class FractalTensor:
    """A tensor in NZ format: its memory is cubes, so no view of it is the matrix.

    Attributes:
        cubes: ``[..., columns / C0, rows / 16, 16, C0]`` over device memory.
        shape: of the view, ``(..., rows, columns)``, or swapped where ``transposed``.
        dtype: element type.
        transposed: the view's last two dimensions are swapped.
        scratch: of :meth:`load`.
    """

    cubes: torch.Tensor
    shape: torch.Size
    dtype: torch.dtype
    transposed: bool
    scratch: list[torch.Tensor] = field(default_factory=list)

    def load(self) -> torch.Tensor:
        """Return the matrix, in memory that the next call overwrites.

        That memory is kept: new pages for a large weight cost more than its product.
        """
        *batch, w1, h1, h0, w0 = self.cubes.shape
        if not self.scratch:
            self.scratch.append(torch.empty(*batch, h1, h0, w1, w0, dtype=self.dtype))
        rows = self.scratch[0].copy_(self.cubes.movedim(-4, -2))
        matrix = rows.view(*batch, h1 * h0, w1 * w0)
        if self.transposed:
            return matrix[..., : self.shape[-1], : self.shape[-2]].transpose(-1, -2)
        return matrix[..., : self.shape[-2], : self.shape[-1]]

    def store(self, matrix: torch.Tensor) -> None:
        """Write a matrix of ``shape`` into the cubes; what pads them becomes 0."""
        *batch, w1, h1, h0, w0 = self.cubes.shape
        rows = matrix.transpose(-1, -2) if self.transposed else matrix
        padding = (0, w1 * w0 - rows.shape[-1], 0, h1 * h0 - rows.shape[-2])
        padded = torch.nn.functional.pad(rows, padding)
        self.cubes.copy_(padded.reshape(*batch, h1, h0, w1, w0).movedim(-2, -4))

    def numel(self) -> int:
        """Count the elements of the view."""
        return self.shape.numel()

    def element_size(self) -> int:
        """Return bytes per element."""
        return self.dtype.itemsize

    def is_contiguous(self) -> bool:
        """Say whether the view has the storage's order of dimensions."""
        return not self.transposed


@dataclass(frozen=True, slots=True)
class ResizedTensor:
    """An output of the largest possible size; the operator sets its shape (``aclGetViewShape``)."""

    pointer: int
    view: torch.Tensor | None

    def write(self, value: torch.Tensor) -> None:
        """Write the result to the output's memory and its shape to the runtime's object."""
        if self.view is None:
            return
        flat = self.view.view(-1)
        if value.numel() > flat.numel():
            raise ArgumentError(
                f"result {tuple(value.shape)} exceeds the output {tuple(self.view.shape)}"
            )
        flat[: value.numel()].copy_(value.reshape(-1))
        header = (ctypes.c_int64 * (_STRIDES - 1)).from_address(self.pointer + 8)
        header[0] = value.dim()
        header[1 : 1 + value.dim()] = list(value.shape)


class Decoder:
    """Decodes raw arguments by signature.

    Args:
        kind_of: returns what a pointer points to, 0 if it is none of the runtime's live objects.
        bytes_left: returns the bytes from an address to the end of its allocation in device memory,
            0 for other memory.
    """

    def __init__(self, kind_of: Callable[[int], int], bytes_left: Callable[[int], int]) -> None:
        self._kind_of = kind_of
        self._bytes_left = bytes_left
        self._tensors: dict[bytes, torch.Tensor | FractalTensor] = {}
        self._decoders: dict[str, Callable[[int | None], Any]] = {
            "T": self.tensor,
            "R": self._resized,
            "L": self._tensor_list,
            "S": self._scalar,
            "A": lambda pointer: self._array(pointer, 3, "q", 8),
            "F": lambda pointer: self._array(pointer, 4, "f", 4),
            "B": lambda pointer: self._array(pointer, 5, "?", 1),
            "V": self._scalar_list,
        }

    def decode(self, signature: str, raw: Sequence[Any]) -> list[Any]:
        """Decode the arguments of one call.

        Raises:
            ArgumentError: an argument does not fit its letter; names its position.
        """
        decoders = self._decoders
        values = []
        for position, (letter, value) in enumerate(zip(signature, raw, strict=True)):
            try:
                values.append(decoders[letter](value) if letter in decoders else value)
            except ArgumentError as error:
                raise ArgumentError(f"argument {position} ({letter}): {error}") from None
        return values

    def tensor(self, pointer: int | None) -> torch.Tensor | FractalTensor | None:
        """Decode an ``aclTensor``; the result is a view of device memory."""
        if not pointer:
            return None
        self._expect(pointer, _TENSOR_KIND)
        raw = ctypes.string_at(pointer, _TENSOR.size)
        cached = self._tensors.get(raw)
        if cached is not None and (not cached.numel() or self._is_held(raw)):
            return cached
        fields = _TENSOR.unpack(raw)
        decoded = self._decode_tensor(fields)
        if len(self._tensors) >= _MAX_CACHED:
            self._tensors.clear()
        self._tensors[raw] = decoded
        return decoded

    def _is_held(self, raw: bytes) -> bool:
        """Say whether the memory of a kept view was not freed since."""
        (data,) = _DATA.unpack_from(raw, _DATA_AT)
        return self._bytes_left(data) > 0

    def _decode_tensor(self, fields: tuple[int, ...]) -> torch.Tensor | FractalTensor:
        rank = fields[1]
        shape = fields[_DIMS : _DIMS + rank]
        strides = fields[_STRIDES : _STRIDES + rank]
        offset, acl_dtype, acl_format, storage_rank = fields[_OFFSET:_STORAGE_DIMS]
        data = fields[-1]
        dtype = DTYPES.get(acl_dtype)
        if dtype is None:
            raise ArgumentError(f"aclDataType {acl_dtype} is not simulated; known: {[*DTYPES]}")
        if not math.prod(shape) or not data:
            return torch.empty(shape, dtype=dtype)
        storage = fields[_STORAGE_DIMS : _STORAGE_DIMS + storage_rank]
        if acl_format == FRACTAL_NZ:
            if offset:
                raise ArgumentError(f"a view at offset {offset} of an NZ tensor is not simulated")
            return self._fractal(data, dtype, shape, strides, storage)
        span = offset + 1 + sum((n - 1) * step for n, step in zip(shape, strides, strict=True))
        return self._memory(data, dtype, span).as_strided(shape, strides, offset)

    def _fractal(
        self,
        data: int,
        dtype: torch.dtype,
        shape: tuple[int, ...],
        strides: tuple[int, ...],
        storage: tuple[int, ...],
    ) -> torch.Tensor | FractalTensor:
        transposed = len(shape) > 1 and strides[-1] != 1
        rows, columns = (shape[-1], shape[-2]) if transposed else shape[-2:]
        w1, h1, h0, w0 = storage[-4:] if len(storage) >= 4 else (0, 0, 1, 1)
        if (-(-rows // h0), -(-columns // w0)) != (h1, w1):
            raise ArgumentError(
                f"a view {shape} with strides {strides} of an NZ tensor stored as {storage} is not "
                "simulated; allowed are the whole matrix and its transpose. Cast to ND first."
            )
        cubes = self._memory(data, dtype, math.prod(storage)).view(storage)
        if w1 == 1 and not transposed and (rows, columns) == (h1 * h0, w0):
            return cubes.view(shape)  # one column of cubes: the same order as ND
        return FractalTensor(cubes, torch.Size(shape), dtype, transposed)

    def _memory(self, data: int, dtype: torch.dtype, elements: int) -> torch.Tensor:
        """Return device memory as a flat tensor."""
        size = elements * dtype.itemsize
        left = self._bytes_left(data)
        if left < size:
            raise ArgumentError(
                f"{size} bytes at {data:#x}, of which device memory holds {left}; a kernel "
                "reads and writes device memory only. Copy host tensors to the device first."
            )
        return torch.frombuffer((ctypes.c_char * size).from_address(data), dtype=dtype)

    def _resized(self, pointer: int | None) -> ResizedTensor | None:
        view = self.tensor(pointer)
        if not pointer or view is None:
            return None
        if isinstance(view, FractalTensor):
            raise ArgumentError("an output of unknown shape cannot have NZ format")
        return ResizedTensor(pointer, view)

    def _scalar(self, pointer: int | None) -> Any:
        if not pointer:
            return None
        self._expect(pointer, _SCALAR_KIND)
        _, dtype, value = _SCALAR.unpack(ctypes.string_at(pointer, _SCALAR.size))
        if dtype == _BFLOAT16:
            return struct.unpack("<f", b"\0\0" + value[:2])[0]
        if dtype in (_COMPLEX64, _COMPLEX128):
            return complex(*struct.unpack_from("<2f" if dtype == _COMPLEX64 else "<2d", value))
        if dtype not in _SCALAR_FORMATS:
            raise ArgumentError(f"a scalar of aclDataType {dtype} is not simulated")
        return struct.unpack_from("<" + _SCALAR_FORMATS[dtype], value)[0]

    def _array(self, pointer: int | None, kind: int, code: str, size: int) -> list[Any] | None:
        if not pointer:
            return None
        self._expect(pointer, kind)
        _, count, data = _ARRAY.unpack(ctypes.string_at(pointer, _ARRAY.size))
        return list(struct.unpack(f"<{count}{code}", ctypes.string_at(data, count * size)))

    def _tensor_list(self, pointer: int | None) -> list[Any] | None:
        pointers = self._array(pointer, 6, "Q", 8)
        return None if pointers is None else [self.tensor(each) for each in pointers]

    def _scalar_list(self, pointer: int | None) -> list[Any] | None:
        pointers = self._array(pointer, 7, "Q", 8)
        return None if pointers is None else [self._scalar(each) for each in pointers]

    def _expect(self, pointer: int, kind: int) -> None:
        found = self._kind_of(pointer)
        if found != kind:
            raise ArgumentError(
                f"expected a {_KINDS[kind]} but {pointer:#x} is "
                f"{_KINDS.get(found, 'no live object')}; the operator's signature is wrong"
            )


def c_types(signature: str) -> list[Any]:
    """Return the ctypes types of a signature's arguments."""
    return [_C_TYPES[letter] for letter in signature]
