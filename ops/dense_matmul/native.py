"""``dense_matmul`` on the native CPU kernels."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

import torch

from .. import native
from ..dispatch import Support

if TYPE_CHECKING:
    from . import DenseRequest

#: Up to so many rows our kernel is faster than torch's (measured in bfloat16 and float32, see
#: ``ops/csrc/README.md``): it reads weights once, as they lie. Beyond, what torch re-orders first
#: pays. Not in float16, for which torch has no fast product.
FEW_ROWS = 64


def supports(request: DenseRequest) -> Support:
    """Serve every request when a library runs on this machine."""
    return native.support()


def load() -> Callable[..., torch.Tensor]:
    """Return the best library's kernel."""
    return partial(_multiply, native.load())


def _multiply(
    lib: native.NativeLibrary, x: torch.Tensor, weights: torch.Tensor, bias: torch.Tensor | None
) -> torch.Tensor:
    m = x.shape[0]
    if m > FEW_ROWS and (x.dtype is not torch.float16 or lib.isa == "portable"):
        return torch.nn.functional.linear(x, weights, bias)
    out = torch.empty((m, weights.shape[0]), dtype=x.dtype)
    if m:
        native.dense(lib, x, weights, bias, out)
    return out
