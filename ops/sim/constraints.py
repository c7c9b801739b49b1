"""What the hardware's operators refuse, as checks that name their source.

A check runs in the operator's first phase, where CANN's own checks run, so a call that the hardware
would refuse fails here too. Sources are public: the operators' documentation in op-plugin
(``docs/zh/custom_APIs/torch_npu``) and the tiling checks of CANN's ops-transformer and ops-nn.
"""

from __future__ import annotations

import torch

from .arguments import FractalTensor

AnyTensor = torch.Tensor | FractalTensor


class ConstraintError(Exception):
    """A call that the hardware's operator refuses.

    Attributes:
        source: where the constraint is written.
    """

    def __init__(self, text: str, source: str) -> None:
        super().__init__(f"{text} [source: {source}]")
        self.source = source


def require(condition: bool, text: str, source: str) -> None:
    """Raise a :class:`ConstraintError` unless ``condition`` holds.

    Callers on hot paths compare first and format the text only to raise.
    """
    if not condition:
        raise ConstraintError(text, source)


def require_contiguous(source: str, **tensors: AnyTensor | None) -> None:
    """Refuse tensors that are not contiguous."""
    for name, tensor in tensors.items():
        if tensor is not None and not tensor.is_contiguous():
            raise ConstraintError(
                f"{name} {tuple(tensor.shape)} is not contiguous; call .contiguous() first", source
            )


def require_dtype(source: str, allowed: tuple[torch.dtype, ...], **tensors: AnyTensor) -> None:
    """Refuse tensors of other element types than ``allowed``."""
    for name, tensor in tensors.items():
        if tensor.dtype not in allowed:
            raise ConstraintError(
                f"{name} is {tensor.dtype}; allowed: {', '.join(map(str, allowed))}", source
            )
