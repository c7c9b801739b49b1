"""Native CPU kernels: build, find, load and call the libraries made from ``ops/csrc``."""

from .kernels import PageFields, kv_write, paged_attention
from .linear_kernels import hadamard, int8_linear, linear, quantise
from .loader import IsaStatus, NativeLibrary, NativeLibraryError, load, status, support

__all__ = [
    "IsaStatus",
    "NativeLibrary",
    "NativeLibraryError",
    "PageFields",
    "hadamard",
    "int8_linear",
    "kv_write",
    "linear",
    "load",
    "paged_attention",
    "quantise",
    "status",
    "support",
]
