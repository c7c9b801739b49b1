"""``static_quant`` on the native CPU kernels."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

from .. import native
from ..dispatch import Support

if TYPE_CHECKING:
    from . import StaticRequest


def supports(request: StaticRequest) -> Support:
    """Serve every request when a library runs on this machine."""
    return native.support()


def load() -> Callable[..., None]:
    """Return the best library's kernel."""
    return partial(native.static_quantise, native.load())
