"""Typed call into the native kernel of dense layers; see ``kernels``."""

from __future__ import annotations

import torch

from .abi import Status, pack_dense_args
from .kernels import DTYPES, address, refused
from .loader import NativeLibrary


def dense(
    lib: NativeLibrary,
    x: torch.Tensor,
    weights: torch.Tensor,
    bias: torch.Tensor | None,
    out: torch.Tensor,
) -> None:
    """Call ``ascend_cpu_dense`` on torch's threads; arguments as in ``dense_matmul``.

    Args:
        lib: loaded kernels.
        x: as in the operator, like every argument not named here.
        out: ``[m, n]`` of the type of ``x``, rows contiguous, written.
    """
    m, n = out.shape
    k = x.shape[1]
    status = lib.dense(
        pack_dense_args(
            x.data_ptr(),
            weights.data_ptr(),
            address(bias),
            out.data_ptr(),
            x.stride(0),
            weights.stride(0),
            out.stride(0),
            m,
            n,
            k,
            DTYPES[x.dtype],
            torch.get_num_threads(),
        )
    )
    if status != Status.OK:
        raise refused(f"[{m}, {k}] times weights of {n} columns, {x.dtype}", status)
