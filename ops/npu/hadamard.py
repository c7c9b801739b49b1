"""The rotation of keys and queries of C8D pages, as one matrix product."""

from __future__ import annotations

import functools

import torch

from .. import quantise


@functools.cache
def _matrix(head_dim: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Return the symmetric ``[head_dim, head_dim]`` of :func:`ops.quantise.rotate`; it is exact."""
    return quantise.rotate(torch.eye(head_dim)).to(dtype).to(device)


def rotate(rows: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
    """Return ``[..., head_dim]`` turned by a Walsh-Hadamard transform, not normalised.

    The products are summed in float32 and rounded once to the type of ``rows``.

    Args:
        rows: any leading dimensions.
        out: where to write; contiguous.
    """
    matrix = _matrix(rows.shape[-1], rows.dtype, rows.device)
    if out is None:
        return rows @ matrix
    flat = rows.reshape(-1, rows.shape[-1])
    torch.mm(flat, matrix, out=out.view(flat.shape))
    return out
