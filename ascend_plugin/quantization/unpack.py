"""From a checkpoint's tensors to integers: one form for all formats.

A weight is ``(codes - zeros) * scales``; codes and zeros are signed, whatever a file adds to them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from .scheme import Layout, ModuleScheme, Scheme, Source

_AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)

Tensors = Mapping[str, torch.Tensor]


@dataclass(frozen=True, slots=True, eq=False)
class Codes:
    """An unpacked weight.

    Attributes:
        codes: int8 ``[n, k]``, signed; columns of one group lie together.
        scales: float ``[n, k / group]`` in the checkpoint's type.
        zeros: int8 ``[n, k / group]``, signed; None: all zero.
        order: int64 ``[k]``: the input feature of each column; None: as they come.
    """

    codes: torch.Tensor
    scales: torch.Tensor
    zeros: torch.Tensor | None = None
    order: torch.Tensor | None = None


@dataclass(frozen=True, slots=True, eq=False)
class StaticInput:
    """How an input is quantised with numbers of the checkpoint: ``round(x / scale) + zero``.

    Attributes:
        scale: of the input.
        zero: 0 if symmetric.
    """

    scale: float
    zero: int


def unpack(module: ModuleScheme, tensors: Tensors) -> Codes:
    """Unpack a module's weight.

    Args:
        module: how it is packed.
        tensors: whole tensors of the checkpoint, by role.
    """
    codes = _codes(module, tensors)
    scales, zeros = _scales_and_zeros(module, tensors)
    if zeros is not None and not bool(zeros.any()):
        zeros = None
    order = _order(module, tensors)
    if order is not None:
        codes = codes[:, order]
    return Codes(codes.contiguous(), scales.contiguous(), zeros, order)


def _codes(module: ModuleScheme, tensors: Tensors) -> torch.Tensor:
    """Return signed codes int8 ``[n, k]`` in the order of the input features."""
    layout, half = module.layout, 1 << (module.bits - 1)
    if layout is Layout.INT8:
        return tensors["weight"]
    if layout is Layout.NIBBLES_IN:
        return _nibbles(tensors["weight"]).flatten(1)
    if layout is Layout.NIBBLES_OUT:
        return _nibbles(tensors["weight"]).transpose(1, 2).flatten(0, 1)
    if layout is Layout.INT32_IN:
        fields = _fields(tensors["weight_packed"], module.bits).flatten(1)  # [n, k]
        return (fields[:, : module.k] - half).to(torch.int8)
    fields = _fields(tensors["qweight"], module.bits)  # [rows, columns, codes]
    if layout is Layout.GPTQ:
        whole = fields.transpose(1, 2).flatten(0, 1)  # [k, n]
    else:
        whole = fields[:, :, _awq_places()].flatten(1)  # [k, n]
    return (whole.T - half).to(torch.int8)


def _awq_places() -> list[int]:
    """Return where in an int32 the code of each output feature lies."""
    return [_AWQ_ORDER.index(i) for i in range(8)]


def _nibbles(packed: torch.Tensor) -> torch.Tensor:
    """Return signed 4-bit codes ``[rows, columns, 2]`` of int8 ``[rows, columns]``."""
    low = (packed << 4) >> 4
    return torch.stack((low, packed >> 4), -1)


def _fields(packed: torch.Tensor, bits: int) -> torch.Tensor:
    """Return the unsigned fields of int32 words, uint8's range as int16 ``[*shape, 32 / bits]``."""
    mask = (1 << bits) - 1
    parts = [((packed >> shift) & mask).to(torch.int16) for shift in range(0, 32, bits)]
    return torch.stack(parts, -1)


def _scales_and_zeros(
    module: ModuleScheme, tensors: Tensors
) -> tuple[torch.Tensor, torch.Tensor | None]:
    if module.source is Source.MODELSLIM:
        return _modelslim_scales(module, tensors)
    if module.source is Source.COMPRESSED_TENSORS:
        return _compressed_scales(module, tensors)
    scales = tensors["scales"].T  # [n, groups]
    if "qzeros" not in tensors:
        return scales, None
    fields = _fields(tensors["qzeros"], module.bits)  # [groups, columns, codes]
    if module.source is Source.AWQ:
        fields = fields[:, :, _awq_places()]
    mask = (1 << module.bits) - 1
    unsigned = (fields.flatten(1).T + module.zero_shift) & mask
    return scales, (unsigned - (1 << (module.bits - 1))).to(torch.int8).contiguous()


def _modelslim_scales(
    module: ModuleScheme, tensors: Tensors
) -> tuple[torch.Tensor, torch.Tensor | None]:
    if module.scheme is Scheme.W8A8:
        return deq_scale(tensors).view(-1, 1), None
    scales = tensors["weight_scale"].reshape(module.n, -1)
    offsets = tensors["weight_offset"].reshape(module.n, -1)
    if "weight_scale_second" in tensors:
        # 8-bit codes per channel, of which the 4-bit ones are codes per group. Offsets are zero.
        scales = scales.float() * tensors["weight_scale_second"].reshape(module.n, -1).float()
        offsets = torch.zeros_like(scales)
    # Offsets are whole numbers that float types hold.
    return scales, offsets.to(torch.int8)


def deq_scale(tensors: Tensors) -> torch.Tensor:
    """Return ModelSlim's ``deq_scale`` as float32 ``[n]``.

    An int64 one, written for models that are not bfloat16, holds the bits of the float32.
    """
    stored = tensors["deq_scale"].flatten()
    if stored.dtype == torch.int64:
        return stored.to(torch.int32).view(torch.float32)
    return stored.to(torch.float32)


def _compressed_scales(
    module: ModuleScheme, tensors: Tensors
) -> tuple[torch.Tensor, torch.Tensor | None]:
    groups = module.k // module.group
    scales = tensors["weight_scale"]
    if scales.numel() == 1:
        scales = scales.flatten().expand(module.n)
    scales = scales.reshape(module.n, groups)
    zeros = tensors.get("weight_zero_point")
    if zeros is None or module.symmetric:
        return scales, None
    if module.layout is Layout.INT32_IN:
        fields = _fields(zeros, module.bits)  # [n / codes, groups, codes]
        whole = fields.transpose(1, 2).flatten(0, 1)[: module.n]
        return scales, (whole - (1 << (module.bits - 1))).to(torch.int8).contiguous()
    if zeros.numel() == 1:
        zeros = zeros.flatten().expand(module.n)
    return scales, zeros.reshape(module.n, groups).to(torch.int8)


def _order(module: ModuleScheme, tensors: Tensors) -> torch.Tensor | None:
    """Return the input features sorted by their group; None: they are sorted."""
    index = tensors.get("g_idx", tensors.get("weight_g_idx"))
    if index is None or not module.activation_order:
        return None
    order = torch.argsort(index.long(), stable=True)
    return None if bool((order == torch.arange(len(order))).all()) else order


def static_input(module: ModuleScheme, tensors: Tensors) -> StaticInput:
    """Return how a module's input is quantised with numbers of the checkpoint."""
    scale = float(tensors["input_scale"].flatten()[0])
    name = "input_offset" if module.source is Source.MODELSLIM else "input_zero_point"
    if module.source is Source.COMPRESSED_TENSORS and module.input and module.input.symmetric:
        return StaticInput(scale, 0)
    zero = tensors.get(name)
    return StaticInput(scale, 0 if zero is None else int(zero.flatten()[0]))
