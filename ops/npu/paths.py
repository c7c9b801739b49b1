"""Runs attention by the implementation that :data:`ops.npu.attention.operator` has chosen."""

from __future__ import annotations

import torch

from . import ascendc, attention, gather
from .attention import Batch, Head
from .planes import Planes


def attend(
    chosen: str,
    query: torch.Tensor,
    planes: Planes,
    batch: Batch,
    head: Head,
    out: torch.Tensor,
) -> None:
    """Attend to planes, into ``out``.

    Args:
        chosen: name of the implementation.
        query: ``[tokens, heads, head_dim]``.
        planes: of the layer's pages.
        batch: lengths and blocks.
        head: the layer's constants.
        out: like ``query``.
    """
    if chosen == ascendc.NAME:
        assert batch.device is not None
        ascendc.attend(query, planes, batch.device, head.layer, out, head.scale, head.window)
    elif chosen == attention.KERNEL_GATHER:
        gather.attend_by_kernel(query, planes, batch, head, out)
    elif chosen == attention.GATHER:
        gather.attend(query, planes, batch, head, out)
    else:
        attention.attend(query, planes, batch, head, out)
