"""``kv_cache_write`` on the native CPU kernels."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from .. import native
from ..dispatch import Support
from ..page_layout import PageLayout

if TYPE_CHECKING:
    from . import WriteRequest


def supports(request: WriteRequest) -> Support:
    """Serve every request when a library runs on this machine."""
    return native.support()


def kv_cache_write(
    key: torch.Tensor,
    value: torch.Tensor,
    pages: torch.Tensor,
    slot_mapping: torch.Tensor,
    layout: PageLayout,
) -> None:
    """Write in one pass over K and V; see the operator's documentation."""
    native.kv_write(
        native.load(),
        key,
        value,
        pages,
        slot_mapping,
        layout,
        num_threads=torch.get_num_threads(),
    )
