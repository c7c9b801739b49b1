"""Memory of recorded steps."""

from __future__ import annotations

from math import prod

import torch


class Pool:
    """Memory of recorded steps: what one no longer needs, its later calls and other steps reuse."""

    def __init__(self) -> None:
        """Begin without memory."""
        self._blocks: list[torch.Tensor] = []

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return sum(block.nbytes for block in self._blocks)

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """Return contiguous memory that no living tensor of the pool uses."""
        needed = max(1, prod(shape)) * dtype.itemsize
        fitting = (block for block in self._blocks if needed <= block.nbytes and _unused(block))
        block = min(fitting, key=lambda each: each.nbytes, default=None)
        if block is None:
            # Rows of 64 bytes: kernels load whole vectors.
            block = torch.empty(-(-needed // 64) * 64, dtype=torch.uint8)
            self._blocks.append(block)
        count = prod(shape) * dtype.itemsize
        return block[:count].view(dtype).view(shape)


def _unused(block: torch.Tensor) -> bool:
    storage = block.untyped_storage()
    # One use is the block's, one this function's.
    return int(torch._C._storage_Use_Count(storage._cdata)) <= 2
