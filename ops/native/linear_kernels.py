"""Typed calls into the native kernels of linear layers; see ``kernels``."""

from __future__ import annotations

import torch

from .abi import (
    Status,
    pack_hadamard_args,
    pack_int8_linear_args,
    pack_linear_args,
    pack_quantise_args,
    pack_static_quantise_args,
)
from .kernels import DTYPES, address, refused
from .loader import NativeLibrary


def linear(
    lib: NativeLibrary,
    x: torch.Tensor,
    weight: torch.Tensor,
    scales: torch.Tensor,
    zeros: torch.Tensor | None,
    bias: torch.Tensor | None,
    out: torch.Tensor,
    group: int,
    bits: int,
) -> None:
    """Call ``ascend_cpu_linear`` on torch's threads; arguments as in ``weight_quant_matmul``.

    Args:
        lib: loaded kernels.
        x: as in the operator, like every argument not named here.
        out: ``[m, n]`` of the type of ``x``, written.
    """
    m, n = out.shape
    addresses = (weight.data_ptr(), scales.data_ptr(), address(zeros), address(bias))
    dtype = DTYPES[x.dtype]
    status = lib.linear(
        pack_linear_args(
            x.data_ptr(),
            out.data_ptr(),
            *addresses,
            x.stride(0),
            n,
            m,
            n,
            x.shape[1],
            group,
            bits,
            dtype,
            DTYPES[scales.dtype],
            dtype if bias is None else DTYPES[bias.dtype],
            torch.get_num_threads(),
        )
    )
    if status != Status.OK:
        raise refused(f"[{m}, {x.shape[1]}] times {bits}-bit weights, group {group}", status)


def int8_linear(
    lib: NativeLibrary,
    x: torch.Tensor,
    weight: torch.Tensor,
    column_sums: torch.Tensor,
    weight_scale: torch.Tensor,
    x_scale: torch.Tensor,
    x_zero: torch.Tensor | None,
    quant_bias: torch.Tensor | None,
    bias: torch.Tensor | None,
    out: torch.Tensor,
) -> None:
    """Call ``ascend_cpu_int8_linear`` on torch's threads; arguments as in ``quant_matmul``.

    Args:
        lib: loaded kernels.
        x: as in the operator, like every argument not named here.
        out: ``[m, n]``, written.
    """
    m, n = out.shape
    dtype = DTYPES[out.dtype]
    addresses = (x, out, weight, column_sums, weight_scale, x_scale, x_zero, quant_bias, bias)
    status = lib.int8_linear(
        pack_int8_linear_args(
            *(address(tensor) for tensor in addresses),
            x.stride(0),
            n,
            m,
            n,
            x.shape[1],
            x_scale.shape[0] > 1,
            x_zero is not None and x_zero.shape[0] > 1,
            dtype,
            dtype if bias is None else DTYPES[bias.dtype],
            torch.get_num_threads(),
        )
    )
    if status != Status.OK:
        raise refused(f"[{m}, {x.shape[1]}] times int8 weights [{n}]", status)


def quantise(
    lib: NativeLibrary,
    x: torch.Tensor,
    codes: torch.Tensor,
    scales: torch.Tensor,
    zeros: torch.Tensor | None,
) -> None:
    """Call ``ascend_cpu_quantise`` on torch's threads; all but ``lib`` and ``x`` are written.

    Args:
        lib: loaded kernels.
        x: ``[m, k]``, rows contiguous.
        codes: int8 ``[m, k]``, contiguous.
        scales: float32 ``[m]``.
        zeros: int32 ``[m]``, or None: symmetric.
    """
    m, k = x.shape
    addresses = (address(each) for each in (x, codes, scales, zeros))
    sizes = (x.stride(0), m, k, DTYPES[x.dtype], torch.get_num_threads())
    status = lib.quantise(pack_quantise_args(*addresses, *sizes))
    if status != Status.OK:
        raise refused(f"dynamic_quant of [{m}, {k}]", status)


def static_quantise(
    lib: NativeLibrary,
    x: torch.Tensor,
    factor: torch.Tensor,
    zero: torch.Tensor,
    codes: torch.Tensor,
) -> None:
    """Call ``ascend_cpu_static_quantise`` on torch's threads.

    Args:
        lib: loaded kernels.
        x: ``[m, k]``, rows contiguous.
        factor: float ``[1]``.
        zero: ``[1]``, of the type of ``factor``.
        codes: int8 ``[m, k]``, contiguous, written.
    """
    m, k = x.shape
    addresses = (each.data_ptr() for each in (x, factor, zero, codes))
    types = (DTYPES[x.dtype], DTYPES[factor.dtype])
    status = lib.static_quantise(
        pack_static_quantise_args(*addresses, x.stride(0), m, k, *types, torch.get_num_threads())
    )
    if status != Status.OK:
        raise refused(f"static_quant of [{m}, {k}]", status)


def hadamard(
    lib: NativeLibrary,
    x: torch.Tensor,
    base: torch.Tensor | None,
    out: torch.Tensor,
    block: int,
    scale: float,
) -> None:
    """Call ``ascend_cpu_hadamard`` on torch's threads; arguments as in ``hadamard``.

    Args:
        lib: loaded kernels.
        x: ``[m, d]``, rows contiguous.
        base: float32 ``[order, order]``, contiguous, or None.
        out: ``[m, d]`` contiguous, of the type of ``x``, written.
        block: columns that are mixed with each other.
        scale: factor of the result.
    """
    m, d = x.shape
    order = 1 if base is None else base.shape[0]
    addresses = (x.data_ptr(), out.data_ptr(), address(base))
    sizes = (x.stride(0), m, d, block, order, scale, DTYPES[x.dtype], torch.get_num_threads())
    status = lib.hadamard(pack_hadamard_args(*addresses, *sizes))
    if status != Status.OK:
        raise refused(f"hadamard of [{m}, {d}] in blocks of {block}", status)
