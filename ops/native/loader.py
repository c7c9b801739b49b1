"""Finds, checks and loads the kernel library that suits this machine."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import NamedTuple

from ..dispatch import Support
from . import abi, build

#: Forces one instruction set, for tests and for telling kernels and compilers apart.
ISA_VARIABLE = "ASCEND_PLUGIN_CPU_ISA"
#: Fields of :class:`NativeLibrary` and the C functions they hold.
_FUNCTIONS = {
    "attention": "ascend_cpu_paged_attention",
    "write": "ascend_cpu_kv_write",
    "linear": "ascend_cpu_linear",
    "int8_linear": "ascend_cpu_int8_linear",
    "quantise": "ascend_cpu_quantise",
    "hadamard": "ascend_cpu_hadamard",
    "mla_attention": "ascend_cpu_mla_attention",
    "mla_write": "ascend_cpu_mla_write",
    "add_rms_norm": "ascend_cpu_add_rms_norm",
    "dense": "ascend_cpu_dense",
    "rotary": "ascend_cpu_rotary",
    "elementwise": "ascend_cpu_elementwise",
    "embedding": "ascend_cpu_embedding",
    "static_quantise": "ascend_cpu_static_quantise",
    "run_steps": "ascend_cpu_run_steps",
}
_REBUILD = "rebuild it: pip install -e . (or python -m ascend_plugin.ops.native)"


class NativeLibraryError(RuntimeError):
    """No usable kernel library; the message says which were tried and what to do."""


@dataclass(slots=True)  # not frozen: steps.record replaces functions for a while
class NativeLibrary:
    """A loaded kernel library.

    Attributes:
        isa: instruction set it was compiled for.
        path: the file.
        attention: ``ascend_cpu_paged_attention``; takes ``byref(AttentionArgs)``.
        write: ``ascend_cpu_kv_write``; takes ``byref(WriteArgs)``.
        linear: ``ascend_cpu_linear``; takes ``byref(LinearArgs)``.
        int8_linear: ``ascend_cpu_int8_linear``; takes ``byref(Int8LinearArgs)``.
        quantise: ``ascend_cpu_quantise``; takes ``byref(QuantiseArgs)``.
        hadamard: ``ascend_cpu_hadamard``; takes ``byref(HadamardArgs)``.
        mla_attention: ``ascend_cpu_mla_attention``; takes ``byref(MlaArgs)``.
        mla_write: ``ascend_cpu_mla_write``; takes ``byref(MlaWriteArgs)``.
        add_rms_norm: ``ascend_cpu_add_rms_norm``; takes ``byref(AddRmsNormArgs)``.
        dense: ``ascend_cpu_dense``; takes ``byref(DenseArgs)``.
        rotary: ``ascend_cpu_rotary``; takes ``byref(RotaryArgs)``.
        elementwise: ``ascend_cpu_elementwise``; takes ``byref(ElementwiseArgs)``.
        embedding: ``ascend_cpu_embedding``; takes ``byref(EmbeddingArgs)``.
        static_quantise: ``ascend_cpu_static_quantise``; takes ``byref(StaticQuantiseArgs)``.
        run_steps: ``ascend_cpu_run_steps``; takes steps, their number and ``byref(c_int64)``.
    """

    isa: str
    path: Path
    attention: Callable[[object], int]
    write: Callable[[object], int]
    linear: Callable[[object], int]
    int8_linear: Callable[[object], int]
    quantise: Callable[[object], int]
    hadamard: Callable[[object], int]
    mla_attention: Callable[[object], int]
    mla_write: Callable[[object], int]
    add_rms_norm: Callable[[object], int]
    dense: Callable[[object], int]
    rotary: Callable[[object], int]
    elementwise: Callable[[object], int]
    embedding: Callable[[object], int]
    static_quantise: Callable[[object], int]
    run_steps: Callable[[object, object, object], int]


class IsaStatus(NamedTuple):
    """Whether one instruction set can be used here.

    Attributes:
        name: instruction set.
        built: its library exists.
        runnable: it loads, matches this package and suits this processor.
        reason: why not, or "" when runnable.
    """

    name: str
    built: bool
    runnable: bool
    reason: str


def _open(isa: str) -> NativeLibrary:
    path = build.library_path(isa)
    if not path.is_file():
        raise NativeLibraryError(f"{path} is missing; {_REBUILD}")
    try:
        handle = ctypes.CDLL(str(path), mode=os.RTLD_LOCAL | os.RTLD_NOW)
        runnable, sources = handle.ascend_cpu_runnable, handle.ascend_cpu_sources
        report = handle.ascend_cpu_abi
        functions = {field: getattr(handle, name) for field, name in _FUNCTIONS.items()}
    except (OSError, AttributeError) as error:
        raise NativeLibraryError(f"{path} does not load: {error}; {_REBUILD}") from error
    if not runnable():
        raise NativeLibraryError(f"this processor does not have the {isa} instruction set")
    sizes = (ctypes.c_int64 * len(abi.expected_abi()))()
    report(sizes)
    if tuple(sizes) != abi.expected_abi():
        raise NativeLibraryError(
            f"{path} has ABI {tuple(sizes)}, this package expects {abi.expected_abi()} (version, "
            f"bytes of argument structs); {_REBUILD}"
        )
    sources.restype = ctypes.c_char_p
    if sources().decode() != _source_hash():
        raise NativeLibraryError(
            f"{path} was compiled from other sources than {build.SOURCE_DIR}; {_REBUILD}"
        )
    return NativeLibrary(isa=isa, path=path, **functions)


@cache
def _source_hash() -> str:
    return build.source_hash()


@cache
def _attempt(isa: str) -> NativeLibrary | NativeLibraryError:
    try:
        return _open(isa)
    except NativeLibraryError as error:
        return error


def status() -> list[IsaStatus]:
    """Every instruction set, best first, and whether it can be used here."""
    rows = []
    for isa in build.ISA_FLAGS:
        attempt = _attempt(isa)
        usable = isinstance(attempt, NativeLibrary)
        reason = "" if usable else str(attempt)
        rows.append(IsaStatus(isa, build.library_path(isa).is_file(), usable, reason))
    return rows


@cache
def _choose(forced: str) -> NativeLibrary:
    isas = list(build.ISA_FLAGS)
    if forced and forced not in isas:
        raise NativeLibraryError(
            f"unknown instruction set {forced!r} (argument or {ISA_VARIABLE}); allowed: "
            f"{', '.join(isas)}"
        )
    failures = []
    for isa in [forced] if forced else isas:
        attempt = _attempt(isa)
        if isinstance(attempt, NativeLibrary):
            return attempt
        failures.append(f"{isa}: {attempt}")
    usable = [row.name for row in status() if row.runnable]
    raise NativeLibraryError(
        "no usable CPU kernel library ("
        + "; ".join(failures)
        + f"); usable here: {', '.join(usable) or 'none'}"
    )


def load(isa: str | None = None) -> NativeLibrary:
    """Loads the kernels, once per instruction set.

    Args:
        isa: instruction set; the one named by ``ASCEND_PLUGIN_CPU_ISA``, else the best that this
            processor runs, when None.

    Raises:
        NativeLibraryError: unknown or unusable instruction set, or no library at all.
    """
    return _choose(isa if isa is not None else os.environ.get(ISA_VARIABLE, "").strip())


def support() -> Support:
    """Say whether native kernels run here: which library, or why none does."""
    try:
        library = load()
    except NativeLibraryError as error:
        return Support(False, str(error))
    return Support(True, f"native {library.isa} kernels")
