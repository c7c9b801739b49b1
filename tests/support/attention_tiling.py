"""The tiling of ``paged_attention_c8``, compiled for this machine."""

from __future__ import annotations

import ctypes
import hashlib
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import NamedTuple

from ascend_plugin.ops.ascendc import build
from ascend_plugin.ops.native.build import find_compiler

_SOURCE = Path(__file__).with_suffix(".cpp")


class Geometry(NamedTuple):
    """What does not change during a launch; names as in attention_tiling.h."""

    step_rows: int
    slots: int
    slot_columns: int
    pages_per_tile: int
    tile_tokens: int
    patch_columns: int
    columns: int


class Context(NamedTuple):
    """What the rows of a sequence see."""

    first: int
    first_page: int
    pages: int
    tiles: int


@dataclass(frozen=True, slots=True)
class Shape:
    """Arguments of ``MakeGeometry``."""

    heads: int
    kv_heads: int
    head_dim: int
    block_size: int
    max_query_len: int
    window: int
    quantisation: int

    def geometry(self) -> Geometry:
        """Return the geometry of a launch."""
        return Geometry(*self._call("tiling_geometry", 7))

    def context(self, length: int, queries: int) -> Context:
        """Return what the queries of a sequence of ``length`` tokens see."""
        return Context(*self._call("tiling_context", 4, length, queries))

    def workspace(self) -> list[int]:
        """Return the offsets of a core's arrays, and the bytes of all of them."""
        out = (ctypes.c_uint64 * 9)()
        _library().tiling_workspace(self._words(), out)
        return list(out)

    def workspace_bytes(self, cores: int) -> int:
        """Return what a launch needs."""
        return int(_library().tiling_workspace_bytes(self._words(), cores))

    def _words(self) -> ctypes.Array[ctypes.c_uint32]:
        return (ctypes.c_uint32 * 7)(
            self.heads,
            self.kv_heads,
            self.head_dim,
            self.block_size,
            self.max_query_len,
            self.window,
            self.quantisation,
        )

    def _call(self, name: str, values: int, *numbers: int) -> Sequence[int]:
        out = (ctypes.c_uint32 * values)()
        _library()[name](self._words(), *map(ctypes.c_uint32, numbers), out)
        return list(out)


def share_begin(total: int, cores: int, core: int) -> int:
    """Return the first tile of a core's share."""
    return int(_library().tiling_share_begin(ctypes.c_uint64(total), cores, core))


def owner(total: int, cores: int, position: int) -> int:
    """Return the core that has a tile."""
    return int(_library().tiling_owner(ctypes.c_uint64(total), cores, ctypes.c_uint64(position)))


@cache
def _library() -> ctypes.CDLL:
    header = build.kernel_folder() / "attention_tiling.h"
    key = hashlib.sha256(_SOURCE.read_bytes() + header.read_bytes()).hexdigest()[:16]
    target = build.cache_folder() / f"attention_tiling-{key}.so"
    if not target.is_file():
        target.parent.mkdir(parents=True, exist_ok=True)
        fresh = target.with_suffix(".tmp")
        flags = ["-std=c++17", "-O1", "-shared", "-fPIC", "-Wall", "-Werror", f"-I{header.parent}"]
        command = [*find_compiler(), *flags, str(_SOURCE), "-o", str(fresh)]
        subprocess.run(command, check=True)
        fresh.replace(target)
    library = ctypes.CDLL(str(target))
    for name in ("tiling_workspace_bytes", "tiling_share_begin"):
        getattr(library, name).restype = ctypes.c_uint64
    return library
