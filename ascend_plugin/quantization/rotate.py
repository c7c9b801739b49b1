"""Rotations at run time: of a module's input before its product, or of its output after."""

from __future__ import annotations

import math

import torch

from ascend_plugin.ops.hadamard import hadamard

from .errors import wrong_tensor
from .scheme import Rotation
from .tensors import TensorIndex


class Rotate(torch.nn.Module):
    """One rotation: ``forward(x [tokens, features])`` returns the same shape and type."""

    def __init__(self, rotation: Rotation, index: TensorIndex) -> None:
        """Read the rotation's matrices.

        Args:
            rotation: of a module.
            index: tensors of the checkpoint.
        """
        super().__init__()
        self.matrix_0: torch.Tensor
        self.matrix_1: torch.Tensor
        self.kind, self.block = rotation.kind, rotation.block
        matrices = [index.read(name).to(torch.float64) for name in rotation.tensors]
        if self.kind == "matrix":
            # Stored without the factor that makes it orthogonal.
            matrices = [matrices[0] / math.sqrt(self.block)]
        for name, matrix in zip(rotation.tensors, matrices, strict=True):
            _check_orthogonal(index, name, matrix)
        if rotation.inverse:
            matrices[0] = matrices[0].T
        for i, matrix in enumerate(matrices):
            self.register_buffer(f"matrix_{i}", matrix.float().contiguous(), persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Rotate."""
        if self.kind == "hadamard":
            return hadamard(x, self.block)
        matrix = self.matrix_0
        if self.kind == "matrix":
            blocks = x.unflatten(-1, (-1, self.block))
            x = (blocks.to(matrix.dtype) @ matrix).flatten(-2).to(x.dtype)
            return x
        inner = self.block // matrix.shape[0]
        grid = x.unflatten(-1, (-1, matrix.shape[0], inner)).to(matrix.dtype)
        if self.kind == "kronecker":
            grid = grid @ self.matrix_1
        x = (matrix.T @ grid).flatten(-3).to(x.dtype)
        return x


def _check_orthogonal(index: TensorIndex, name: str, matrix: torch.Tensor) -> None:
    unit = torch.eye(matrix.shape[0], dtype=matrix.dtype)
    if matrix.shape != unit.shape or not torch.allclose(matrix @ matrix.T, unit, atol=0.05):
        raise wrong_tensor(
            index[name],
            "an orthogonal square matrix",
            "the weights were multiplied with its inverse",
        )
