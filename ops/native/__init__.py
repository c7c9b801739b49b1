"""Native CPU kernels: build, find, load and call the libraries made from ``ops/csrc``."""

from .dense import dense
from .kernels import PageFields, kv_write, paged_attention
from .layers import elementwise, embedding, rotary
from .linear_kernels import hadamard, int8_linear, linear, quantise, static_quantise
from .loader import IsaStatus, NativeLibrary, NativeLibraryError, load, status, support
from .mla import LatentFields, mla_attention, mla_write
from .norm import add_rms_norm

__all__ = [
    "IsaStatus",
    "LatentFields",
    "NativeLibrary",
    "NativeLibraryError",
    "PageFields",
    "add_rms_norm",
    "dense",
    "elementwise",
    "embedding",
    "hadamard",
    "int8_linear",
    "kv_write",
    "linear",
    "load",
    "mla_attention",
    "mla_write",
    "paged_attention",
    "quantise",
    "rotary",
    "static_quantise",
    "status",
    "support",
]
