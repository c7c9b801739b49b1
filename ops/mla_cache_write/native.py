"""``mla_cache_write`` on the native CPU kernels."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

import torch

from .. import native
from ..dispatch import Support
from ..page_layout import LatentLayout

if TYPE_CHECKING:
    from . import LatentWriteRequest


def supports(request: LatentWriteRequest) -> Support:
    """Serve every request when a library runs on this machine."""
    return native.support()


def bind(pages: torch.Tensor, layout: LatentLayout) -> Callable[..., None]:
    """Return the best library's kernel for pages of one layout, shape and strides."""
    return partial(native.mla_write, native.load(), native.LatentFields.of(pages, layout))
