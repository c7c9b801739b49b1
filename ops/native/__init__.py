"""Native CPU kernels: build, find, load and call the libraries made from ``ops/csrc``."""

from .kernels import PageFields, kv_write, paged_attention
from .loader import IsaStatus, NativeLibrary, NativeLibraryError, load, status, support

__all__ = [
    "IsaStatus",
    "NativeLibrary",
    "NativeLibraryError",
    "PageFields",
    "kv_write",
    "load",
    "paged_attention",
    "status",
    "support",
]
