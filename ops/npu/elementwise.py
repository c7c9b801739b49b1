"""Norms, activation and rotary embedding of a decoder layer: one launch each."""

from __future__ import annotations

import torch
import torch_npu

from ..add_rms_norm import check_norm


def rms_norm(x: torch.Tensor, weight: torch.Tensor, epsilon: float) -> torch.Tensor:
    """Return ``x / rms(x) * weight`` over the last dimension, in the shape and dtype of ``x``.

    Args:
        x: ``[..., hidden]``.
        weight: ``[hidden]``, the dtype of ``x``.
        epsilon: added to the mean square.
    """
    out: torch.Tensor = torch_npu.npu_rms_norm(x, weight, epsilon)[0]
    return out


def add_rms_norm(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, epsilon: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the norm of ``x + residual``, and the sum; arguments as in :func:`rms_norm`."""
    normed, _, total = torch_npu.npu_add_rms_norm(x, residual, weight, epsilon)
    return normed, total


def add_rms_norm_in_place(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, epsilon: float = 1e-6
) -> torch.Tensor:
    """Serve ``ascend_plugin::add_rms_norm`` on an NPU; arguments and errors as there.

    The fused operator returns the sum; putting it into ``residual`` takes a second launch.
    """
    check_norm(x, residual, weight, epsilon)
    normed, total = add_rms_norm(x, residual, weight, epsilon)
    residual.copy_(total)
    return normed


def swiglu(x: torch.Tensor) -> torch.Tensor:
    """Return ``silu(gate) * up`` of ``[..., 2 * intermediate]``, gate first."""
    out: torch.Tensor = torch_npu.npu_swiglu(x)
    return out


def rotary(
    positions: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    cos_sin_cache: torch.Tensor,
    head_dim: int,
    *,
    neox: bool = True,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return query and key with rotary embedding (RoPE, arXiv:2104.09864), new and contiguous.

    Args:
        positions: int32 or int64 ``[tokens]``.
        query: ``[tokens, heads * head_dim]``; rows may lie apart.
        key: ``[tokens, kv_heads * head_dim]``.
        cos_sin_cache: ``[max_positions, rotary_dim]``, cosines first, the dtype of ``query``.
        head_dim: elements of a head; those beyond ``rotary_dim`` stay.
        neox: whether halves are paired, else neighbours.
    """
    # The sections are zeros by default, but torch_npu's default is a dangling reference.
    out: tuple[torch.Tensor, torch.Tensor] = torch_npu.npu_mrope(
        positions,
        query,
        key,
        cos_sin_cache,
        head_dim,
        mrope_section=[0, 0, 0],
        rotary_mode="half" if neox else "interleave",
    )
    return out
