"""Matrix products.

The cube unit multiplies 16-bit numbers and adds in float32; one rounding ends it. Weights in NZ
format arrive here as matrices (:class:`..table.Call` unpacks them).
"""

from __future__ import annotations

from typing import Any

import torch

from ..table import operator, write

_SHORT = (torch.bfloat16, torch.float16)


def product(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """Return the product in float32 for 16-bit types, else in their own type."""
    if left.dtype in _SHORT:
        return torch.matmul(left.float(), right.float())
    return torch.matmul(left, right)


def _matmul(left: torch.Tensor, right: torch.Tensor, out: torch.Tensor, _math: int) -> None:
    if left.dtype in _SHORT and left.dtype == out.dtype:
        write(out, torch.matmul(left, right))  # torch's kernels accumulate in float32 as well
    else:
        write(out, product(left, right))


def _zero_product(_left: Any, _right: Any, out: torch.Tensor, _math: int) -> None:
    out.zero_()


def zero_result(*args: Any) -> None:
    """Clear the result of an operator whose last argument it is: what is not computed is zero."""
    args[-1].zero_()


for _name in ("Mm", "Matmul", "MatmulWeightNz", "BatchMatMul", "Mv"):
    operator(f"aclnn{_name}", "TTTh", uncomputed=_zero_product)(_matmul)


def _addmm(
    bias: torch.Tensor | None,
    left: torch.Tensor,
    right: torch.Tensor,
    beta: float,
    alpha: float,
    out: torch.Tensor,
    _math: int,
) -> None:
    result = product(left, right)
    if alpha != 1:
        result *= alpha
    if bias is not None and beta != 0:
        result = result + bias.to(result.dtype) * beta
    write(out, result)


def _zero_sum(
    _bias: Any, _left: Any, _right: Any, _beta: float, _alpha: float, out: torch.Tensor, _math: int
) -> None:
    out.zero_()


for _name in ("Addmm", "AddmmWeightNz", "Baddbmm"):
    operator(f"aclnn{_name}", "TTTSSTh", uncomputed=_zero_sum)(_addmm)


@operator("aclnnInplaceAddmm", "TTTSSh")
def _addmm_in_place(
    target: torch.Tensor,
    left: torch.Tensor,
    right: torch.Tensor,
    beta: float,
    alpha: float,
    math: int,
) -> None:
    _addmm(target, left, right, beta, alpha, target, math)


@operator("aclnnDot", "TTT")
def _dot(left: torch.Tensor, right: torch.Tensor, out: torch.Tensor) -> None:
    write(out, product(left, right))
