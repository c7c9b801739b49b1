"""Typed calls into the native kernel of norms; see ``kernels``."""

from __future__ import annotations

import torch

from .abi import Status, pack_add_rms_norm_args
from .kernels import DTYPES, address, refused
from .loader import NativeLibrary


def add_rms_norm(
    lib: NativeLibrary,
    x: torch.Tensor,
    residual: torch.Tensor | None,
    weight: torch.Tensor,
    epsilon: float,
    out: torch.Tensor,
) -> None:
    """Call ``ascend_cpu_add_rms_norm`` on torch's threads; arguments as in ``add_rms_norm``.

    Args:
        lib: loaded kernels.
        x: as in the operator, like every argument not named here.
        out: shape and type of ``x``, contiguous, written.
    """
    m, k = x.shape
    status = lib.add_rms_norm(
        pack_add_rms_norm_args(
            x.data_ptr(),
            address(residual),
            weight.data_ptr(),
            out.data_ptr(),
            x.stride(0),
            0 if residual is None else residual.stride(0),
            m,
            k,
            epsilon,
            DTYPES[x.dtype],
            DTYPES[weight.dtype],
            torch.get_num_threads(),
        )
    )
    if status != Status.OK:
        raise refused(f"norms of {k} elements of {x.dtype}", status)
