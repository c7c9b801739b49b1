"""How an operator is told where K and V lie inside a page.

The numbers are computed by ``ascend_plugin.kv_cache.PageFormat``, the single source of truth; this
module only names them, so that ``ops`` needs no import from above it.
"""

from __future__ import annotations

from enum import IntEnum
from typing import NamedTuple

#: Bytes of one fractal row: the NPU's cube reads 32-byte rows, whatever the element.
FRACTAL_ROW_BYTES = 32

#: A pool of patches has one slot for so many tokens, for K and for V.
TOKENS_PER_PATCH_SLOT = 8


class Quantisation(IntEnum):
    """What the elements of K and V in a page mean.

    Attributes:
        NONE: they are the values, float32, float16 or bfloat16.
        C8D: int8; a float32 scale per token and kv head lies in the page. K is rotated
            (``ops.quantise.rotate``).
        C8S: int8; a static float32 scale per kv head and channel belongs to the layer.
        C8P: as C8S, and the page holds 4-bit residuals ("patches") of outlier tokens.
    """

    NONE = 0
    C8D = 1
    C8S = 2
    C8P = 3

    @property
    def static(self) -> bool:
        """Whether the scales belong to the layer, and operators must be given them."""
        return self in (Quantisation.C8S, Quantisation.C8P)


class PatchCode(IntEnum):
    """How 4 bits hold an element of a residual, in units of the patch's scale.

    Attributes:
        INT4: two's complement, -7 to 7.
        E3M0: a sign (bit 3) and an exponent (bits 0 to 2): 0, then 1, 2, 4 to 64.
    """

    INT4 = 0
    E3M0 = 1


class Arrangement(IntEnum):
    """In which order the arrays of a page lie in memory.

    Attributes:
        RUN_MAJOR: all of one kv head, then all of the next: what CPU kernels stream.
        PLANE_MAJOR: K of all kv heads, then V of all kv heads: what the NPU's fused operators read.
            Of latents (MLA): those of all blocks, then the rotary parts of all blocks.
    """

    RUN_MAJOR = 0
    PLANE_MAJOR = 1


class PageLayout(NamedTuple):
    """Byte map of one (block, kv head) run of a page.

    Operators take it as ``int[] layout`` (it is a tuple of ints). Offsets are bytes from the start
    of the run.

    Attributes:
        block_size: tokens in a block.
        head_dim: elements of K, and of V, per token and head.
        k_offset: K in NZ order.
        v_offset: V in NZ order.
        run_bytes: bytes of the whole run.
        quantisation: a :class:`Quantisation`.
        k_scales_offset: C8D: float32 ``[block_size]``, what an element of K is worth.
        v_scales_offset: C8D: the same of V.
        patch_code: C8P: a :class:`PatchCode`.
        patch_slots: C8P: slots for K, and for V. Token ``n`` of the block can only use slot
            ``n % patch_slots``.
        k_patches_offset: C8P: K's pool: tags int16 ``[slots]`` (0: empty, ``n + 1``: token ``n``),
            scales float32 ``[slots]``, codes ``[slots, padded_head_dim / 2]`` bytes, of which the
            low half holds the even column. A residual is ``code * scale * channel scale``.
        v_patches_offset: C8P: V's pool.
    """

    block_size: int
    head_dim: int
    k_offset: int
    v_offset: int
    run_bytes: int
    quantisation: int = Quantisation.NONE
    k_scales_offset: int = 0
    v_scales_offset: int = 0
    patch_code: int = PatchCode.INT4
    patch_slots: int = 0
    k_patches_offset: int = 0
    v_patches_offset: int = 0


class PlaneLayout(NamedTuple):
    """What operators on the NPU must know of pages in the arrangement ``PLANE_MAJOR``.

    They take it as ``int[] layout``, like a :class:`PageLayout`. ``num_blocks`` pages are one array
    of ``2 * num_blocks`` planes: K of block 0, V of block 0, K of block 1, and so on, each
    ``(num_kv_heads, padded_head_dim / C0, block_size, C0)``. What int8 pages have besides lies
    behind all of them in the same order: of C8D the scales, float32 ``(num_kv_heads, block_size)``;
    of C8P the pools of patches, ``(num_kv_heads, pool_bytes)``.

    Attributes:
        block_size: tokens in a block.
        head_dim: elements of K, and of V, per token and head.
        num_kv_heads: key/value heads of the layer on this device.
        quantisation: a :class:`Quantisation`.
        patch_code: C8P: a :class:`PatchCode`.
        patch_slots: C8P: slots of a pool; a pool is as in :class:`PageLayout`, and zeros.
    """

    block_size: int
    head_dim: int
    num_kv_heads: int
    quantisation: int = Quantisation.NONE
    patch_code: int = PatchCode.INT4
    patch_slots: int = 0

    @property
    def pool_bytes(self) -> int:
        """Bytes of a pool of patches, of K or of V of one (block, kv head); 0 without."""
        return patch_pool_bytes(self.patch_slots, padded_head_dim(self.head_dim, 1))


class LatentLayout(NamedTuple):
    """Byte map of a page of latents (multi-head latent attention, MLA), one run for all heads.

    Operators take it as ``int[] layout``. Offsets are bytes from the start of the page, at which
    the latents lie, in NZ order.

    Attributes:
        block_size: tokens in a block.
        latent_dim: elements of the compressed K and V of a token (``kv_lora_rank``).
        rotary_dim: elements of the key's part that carries the position (``qk_rope_head_dim``).
        rotary_offset: the rotary parts in NZ order; of bfloat16 in int8 pages, else of the page's
            type.
        scales_offset: C8D: float32 ``[block_size]``, what an element of a latent is worth.
        page_bytes: bytes of the whole page.
        quantisation: of the latents, a :class:`Quantisation`: none, C8D (not rotated) or C8S.
    """

    block_size: int
    latent_dim: int
    rotary_dim: int
    rotary_offset: int
    scales_offset: int
    page_bytes: int
    quantisation: int = Quantisation.NONE


class LatentPlaneLayout(NamedTuple):
    """What operators on the NPU must know of latents in the arrangement ``PLANE_MAJOR``.

    They take it as ``int[] layout``, like a :class:`LatentLayout`. The latents of all blocks come
    first, ``(num_blocks, padded latent_dim / C0, block_size, C0)``; then the rotary parts of all
    blocks, ``(num_blocks, rotary_dim / 16, block_size, 16)``; then, of C8D, the scales, float32
    ``(num_blocks, block_size)``.

    Attributes:
        block_size: tokens in a block.
        latent_dim: as in :class:`LatentLayout`.
        rotary_dim: as in :class:`LatentLayout`.
        quantisation: of the latents, a :class:`Quantisation`: none, C8D (not rotated) or C8S.
    """

    block_size: int
    latent_dim: int
    rotary_dim: int
    quantisation: int = Quantisation.NONE


def column_group(itemsize: int) -> int:
    """Elements per NZ column group (C0): 16 of 2 bytes, 8 of 4 bytes, 32 of 1 byte."""
    return FRACTAL_ROW_BYTES // itemsize


def padded_head_dim(head_dim: int, itemsize: int) -> int:
    """Return ``head_dim`` in whole column groups; what the padding columns hold is undefined."""
    group = column_group(itemsize)
    return -(-head_dim // group) * group


def patch_pool_bytes(slots: int, columns: int) -> int:
    """Return the bytes of a pool of patches in the arrangement ``PLANE_MAJOR``.

    A slot is a tag of 2, a scale of 4 and half a byte per column. Two more make the pools of K and
    V together a whole number of bytes for every token of a block, which has 8 tokens per slot.

    Args:
        slots: of the pool.
        columns: the padded head dimension.
    """
    return slots * (2 + 4 + columns // 2 + 2)
