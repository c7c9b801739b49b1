"""Order of quantised weights in memory: what the kernels of linear layers read.

Columns (output features) come in blocks of 32, k (input features) in words of 32 bits: 8 codes of
4 bits or 4 of 8 bits. The tensor is ``[blocks, words, 32]`` words, so 64 bytes are one word of each
of 16 columns: one load feeds 16 lanes. Codes are two's complement. In a 4-bit word the lower half
holds the even k, the upper half the odd ones, each from its lowest bits up; in an 8-bit word the
bytes are in order. Columns and k are padded with zeros to whole blocks and words.

Scales and zero points are ``[blocks, groups, 32]``. The 8-bit order is the same whether activations
are multiplied as integers or as floats, so one copy of a weight serves both.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

#: Columns of a block.
BLOCK = 32

#: k of a 32-bit word, by bits.
WORD = {4: 8, 8: 4}

#: Bits of a 4-bit word in order of k.
_SHIFTS = (0, 16, 4, 20, 8, 24, 12, 28)

#: Groups are whole numbers of these, so that none ends inside a word or a vector.
GROUP_MULTIPLE = 32

#: Columns that are packed at once: bounds the memory that packing takes beside its result.
_PACKED_AT_ONCE = 1024


@dataclass(frozen=True, slots=True)
class PackedWeight:
    """A quantised weight in the order of a device's kernels; the only copy of it.

    The shapes are those of CPUs. On an NPU (:mod:`ops.npu.quantised_linear`) they are what its
    operator takes: codes ``[k, n]``; scales, and minus the zero points, ``[k / group, n]`` or
    ``[n]``.

    Attributes:
        weight: int32 ``[blocks, words, 32]``.
        scales: float32, float16 or bfloat16 ``[blocks, groups, 32]``.
        zeros: int8 ``[blocks, groups, 32]``, minus the middle code when codes were unsigned; None:
            symmetric.
        n: columns (output features).
        k: input features.
        group: k that share a scale; ``k`` itself for a scale per channel.
        bits: 4 or 8.
    """

    weight: torch.Tensor
    scales: torch.Tensor
    zeros: torch.Tensor | None
    n: int
    k: int
    group: int
    bits: int

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        tensors = (self.weight, self.scales, self.zeros)
        return sum(each.nbytes for each in tensors if each is not None)


def blocks_of(n: int) -> int:
    """Return how many blocks ``n`` columns make."""
    return -(-n // BLOCK)


def words_of(k: int, bits: int) -> int:
    """Return how many words ``k`` codes make."""
    return -(-k // WORD[bits])


def pack_codes(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """Pack signed codes.

    Args:
        codes: int8 ``[n, k]``, within ``bits`` bits.
        bits: 4 or 8.

    Returns:
        int32 ``[blocks, words, 32]``.
    """
    n, k = codes.shape
    out = torch.zeros(blocks_of(n), words_of(k, bits), BLOCK, dtype=torch.int32)
    for first in range(0, n, _PACKED_AT_ONCE):
        part = codes[first : first + _PACKED_AT_ONCE]
        padding = (0, -k % WORD[bits], 0, -part.shape[0] % BLOCK)
        words = _words(torch.nn.functional.pad(part, padding), bits)  # [columns, words]
        block = first // BLOCK
        blocks = words.unflatten(0, (-1, BLOCK)).transpose(1, 2)
        out[block : block + blocks.shape[0]] = blocks
    return out


def _words(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """Return int32 ``[columns, words]`` of int8 ``[columns, k]``, k being whole words."""
    if bits == 8:
        return codes.contiguous().view(torch.int32)
    out = torch.zeros(codes.shape[0], codes.shape[1] // WORD[4], dtype=torch.int32)
    for i, shift in enumerate(_SHIFTS):
        out |= (codes[:, i :: WORD[4]].int() & 15) << shift
    return out


def unpack_codes(weight: torch.Tensor, n: int, k: int, bits: int) -> torch.Tensor:
    """Return the int8 ``[n, k]`` that :func:`pack_codes` was given."""
    words = weight.transpose(1, 2).flatten(0, 1)[:n]  # [n, words]
    if bits == 8:
        # A copy even of one word: only that is sure to have the usual strides.
        return words.clone(memory_format=torch.contiguous_format).view(torch.int8)[:, :k]
    codes = torch.stack([(words << (28 - shift)) >> 28 for shift in _SHIFTS], -1)
    return codes.flatten(1)[:, :k].to(torch.int8)


def pack_columns(values: torch.Tensor) -> torch.Tensor:
    """Return ``[blocks, groups, 32]`` of scales or zero points ``[n, groups]``, padded with 0."""
    padded = torch.nn.functional.pad(values, (0, 0, 0, -values.shape[0] % BLOCK))
    blocks: torch.Tensor = padded.unflatten(0, (-1, BLOCK))  # [blocks, 32, groups]
    return blocks.transpose(1, 2).contiguous()


def unpack_columns(values: torch.Tensor, n: int) -> torch.Tensor:
    """Return ``[n, groups]`` of what :func:`pack_columns` made."""
    return values.transpose(1, 2).flatten(0, 1)[:n]


def dequantise(
    weight: torch.Tensor,
    scales: torch.Tensor,
    zeros: torch.Tensor | None,
    n: int,
    k: int,
    group: int,
    bits: int,
    dtype: torch.dtype = torch.float32,
) -> torch.Tensor:
    """Return ``(code - zero) * scale`` as ``[n, k]``; arguments as in :class:`PackedWeight`."""
    codes = unpack_codes(weight, n, k, bits).to(dtype)
    group_of = torch.arange(k, device=weight.device) // group  # [k]
    if zeros is not None:
        codes -= unpack_columns(zeros, n).to(dtype)[:, group_of]
    return codes * unpack_columns(scales, n).to(dtype)[:, group_of]
