"""Checks of the arguments of linear layers with integer weights; messages as in ``checks``."""

from __future__ import annotations

import torch

from .checks import FLOAT_DTYPES, rows_contiguous
from .packed_weight import BLOCK, GROUP_MULTIPLE, WORD, blocks_of

#: Types of unpacked codes: two's complement, or unsigned around the middle.
CODE_DTYPES = (torch.int8, torch.uint8)


def check_rows(name: str, tensor: torch.Tensor) -> None:
    """Refuse anything but a matrix with contiguous rows of at least one column.

    Raises:
        ValueError: rank, width or innermost stride differ.
    """
    if tensor.dim() != 2 or tensor.shape[1] < 1:
        raise ValueError(
            f"{name} must be [rows, columns] with at least one column, got {list(tensor.shape)}; "
            "flatten its leading dimensions."
        )
    if not rows_contiguous(tensor):
        raise ValueError(f"{name} must be contiguous in its last dimension; call .contiguous().")


def check_bits(bits: int) -> None:
    """Refuse widths of weights that no kernel reads.

    Raises:
        ValueError: neither 4 nor 8.
    """
    if bits not in WORD:
        raise ValueError(
            f"bits={bits} is not supported; allowed are {', '.join(map(str, WORD))}. Quantise the "
            "checkpoint to one of them."
        )


def check_group(k: int, group: int) -> None:
    """Refuse groups that kernels cannot cut k into.

    Raises:
        ValueError: neither k itself nor a multiple of 32 that divides k.
    """
    if group == k:
        return
    if group < 1 or group % GROUP_MULTIPLE or k % group:
        raise ValueError(
            f"group={group} does not cut k={k} into equal parts; allowed are multiples of "
            f"{GROUP_MULTIPLE} that divide k, or {k} itself for a scale per column. Quantise the "
            "checkpoint with another group size, e.g. 64."
        )


def check_codes(codes: torch.Tensor, bits: int, group: int) -> None:
    """Refuse an unpacked weight that cannot be packed.

    Raises:
        ValueError: its shape or type, ``bits``, or ``group``.
    """
    if codes.dim() != 2 or 0 in codes.shape or codes.dtype not in CODE_DTYPES:
        raise ValueError(
            f"codes must be int8 or uint8 [n, k] and not empty, got {codes.dtype} "
            f"{list(codes.shape)}; unpack the checkpoint's words first."
        )
    check_bits(bits)
    check_group(codes.shape[1], group)


def check_group_values(name: str, values: torch.Tensor, n: int, groups: int) -> None:
    """Refuse scales or zero points of another shape than a value per column and group.

    Raises:
        ValueError: another shape.
    """
    if list(values.shape) != [n, groups]:
        raise ValueError(
            f"{name} must be [{n}, {groups}] (columns, groups), got {list(values.shape)}; "
            "transpose it, or change group."
        )


def signed_codes(name: str, codes: torch.Tensor, bits: int, middle: int) -> torch.Tensor:
    """Return codes minus the middle one as int8.

    Args:
        name: of the tensor, for messages.
        codes: integers of any type.
        bits: 4 or 8.
        middle: what is subtracted: 0 for two's complement.

    Raises:
        ValueError: no integers, or one beyond ``bits`` bits.
    """
    if codes.dtype.is_floating_point or codes.dtype.is_complex:
        raise ValueError(f"{name} must be integers, got {codes.dtype}; round them first.")
    low, high = middle - (1 << (bits - 1)), middle + (1 << (bits - 1)) - 1
    least, greatest = int(codes.min()), int(codes.max())
    if least < low or greatest > high:
        raise ValueError(
            f"{name} has values from {least} to {greatest}; {bits} bits of "
            f"{'unsigned' if middle else 'signed'} codes hold {low} to {high}. Check bits and the "
            "numbering of the checkpoint."
        )
    if middle:
        return (codes.to(torch.int16) - middle).to(torch.int8)
    return codes.to(torch.int8)


def check_packed(name: str, tensor: torch.Tensor, dtype: torch.dtype, n: int, middle: int) -> None:
    """Refuse a tensor that is not ``[blocks, middle, 32]`` of the kernels' order.

    Raises:
        ValueError: type, shape or order differ.
    """
    shape = [blocks_of(n), middle, BLOCK]
    if tensor.dtype != dtype or list(tensor.shape) != shape or not tensor.is_contiguous():
        raise ValueError(
            f"{name} must be contiguous {dtype} {shape} for n={n}, got {tensor.dtype} "
            f"{list(tensor.shape)} with strides {list(tensor.stride())}; make it with pack(), and "
            "give the x, n, group and bits that belong to it."
        )


def check_vector(
    name: str, tensor: torch.Tensor, dtypes: tuple[torch.dtype, ...], lengths: tuple[int, ...]
) -> None:
    """Refuse anything but a contiguous vector of a given type and length.

    Raises:
        ValueError: type, rank, length or stride differ.
    """
    if tensor.dtype in dtypes and tensor.dim() == 1 and tensor.shape[0] in lengths:
        if tensor.is_contiguous():
            return
        raise ValueError(f"{name} must be contiguous; call .contiguous().")
    types = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
    sizes = " or ".join(f"[{length}]" for length in sorted(set(lengths)))
    raise ValueError(
        f"{name} must be {types} {sizes}, got {tensor.dtype} {list(tensor.shape)}; flatten or "
        "convert it."
    )


def check_bias(bias: torch.Tensor | None, n: int, dtype: torch.dtype) -> None:
    """Refuse a bias of another length or type than the result's columns; float32 goes with all.

    Raises:
        ValueError: type, rank, length or stride differ.
    """
    if bias is not None:
        allowed = (dtype, torch.float32) if dtype in FLOAT_DTYPES else FLOAT_DTYPES
        check_vector("bias", bias, tuple(dict.fromkeys(allowed)), (n,))
