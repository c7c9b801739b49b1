"""``paged_attention`` on the native CPU kernels."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

import torch

from .. import native
from ..dispatch import Support
from ..page_layout import PageLayout

if TYPE_CHECKING:
    from . import AttentionRequest


def supports(request: AttentionRequest) -> Support:
    """Serve every request when a library runs on this machine."""
    return native.support()


def bind(pages: torch.Tensor, layout: PageLayout) -> Callable[..., None]:
    """Return the best library's kernel for pages of one layout, shape and strides."""
    return partial(native.paged_attention, native.load(), native.PageFields.of(pages, layout))
