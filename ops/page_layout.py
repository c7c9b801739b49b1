"""How an operator is told where K and V lie inside a page.

The numbers are computed by ``ascend_plugin.kv_cache.PageFormat``, the single source of truth; this
module only names them, so that ``ops`` needs no import from above it.
"""

from __future__ import annotations

from typing import NamedTuple

#: Bytes of one fractal row: the NPU's cube reads 32-byte rows, whatever the element.
FRACTAL_ROW_BYTES = 32


class PageLayout(NamedTuple):
    """Byte map of one (block, kv head) run of a page.

    Operators take it as ``int[] layout`` (it is a tuple of ints).

    Attributes:
        block_size: tokens in a block.
        head_dim: elements of K, and of V, per token and head.
        k_offset: bytes from the start of the run to K in NZ order.
        v_offset: bytes from the start of the run to V in NZ order.
        run_bytes: bytes of the whole run.
    """

    block_size: int
    head_dim: int
    k_offset: int
    v_offset: int
    run_bytes: int


def column_group(itemsize: int) -> int:
    """Elements per NZ column group (C0): 16 of 2 bytes, 8 of 4 bytes, 32 of 1 byte."""
    return FRACTAL_ROW_BYTES // itemsize
