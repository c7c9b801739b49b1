"""Arithmetic of int8 pages in plain torch: the meaning of what kernels write and read.

A *row* is the ``head_dim`` elements of one token and kv head, of K or of V. Everything is computed
in float32, one rounding per operation (no fused multiply-add), so that every implementation writes
the same bytes.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from .nz import PatchPool, from_nz, page_patches, page_planes, page_scales
from .page_layout import PageLayout, PatchCode, Quantisation, padded_head_dim

#: Codes are symmetric, so that a scale and its negative mean the same: -128 is never written.
MAX_CODE = 127

#: Scales below this (subnormal numbers) would have no finite reciprocal; they become 0.
SMALLEST_SCALE = 2.0**-126

#: Largest value of a patch's element, in units of the patch's scale.
MAX_PATCH_VALUE = {PatchCode.INT4: 7, PatchCode.E3M0: 64}

#: Halfway between the values of E3M0: 0, 1, 2, 4, 8, 16, 32, 64. What lies on one goes down.
_E3M0_MIDPOINTS = (0.5, 1.5, 3.0, 6.0, 12.0, 24.0, 48.0)


class DynamicRows(NamedTuple):
    """Rows with a scale of their own (C8D).

    Attributes:
        codes: int8 ``[..., head_dim]``.
        scales: float32 ``[...]``; NaN if the row has a NaN or an infinity, and its codes are 0.
    """

    codes: torch.Tensor
    scales: torch.Tensor


class StaticRows(NamedTuple):
    """Rows with a static scale per channel (C8S, C8P).

    Attributes:
        codes: int8 ``[..., head_dim]``.
        residual: float32 ``[..., head_dim]``, what the codes leave over, in units of the scales.
        saturated: bool ``[...]``: the row left the calibrated range, or has a NaN.
    """

    codes: torch.Tensor
    residual: torch.Tensor
    saturated: torch.Tensor


class Patches(NamedTuple):
    """Residuals of rows in 4 bits per element.

    Attributes:
        codes: uint8 ``[..., padded_head_dim / 2]``, the even column in the low half.
        scales: float32 ``[...]``.
    """

    codes: torch.Tensor
    scales: torch.Tensor


def rotate(rows: torch.Tensor) -> torch.Tensor:
    """Apply a Walsh-Hadamard transform without normalisation to ``[..., head_dim]``.

    Blocks of :func:`rotated_channels` channels are mixed: each result is the sum of all of them
    with signs. That spreads a large channel over all others, so one scale per row serves them all;
    keys have such channels (arXiv:2404.00456). Applied twice it multiplies by the blocks' size.

    Args:
        rows: float32 or float64 ``[..., head_dim]``.
    """
    stride = 1
    while stride < rotated_channels(rows.shape[-1]):
        a, b = rows.unflatten(-1, (-1, 2, stride)).unbind(-2)
        rows = torch.stack((a + b, a - b), -2).flatten(-3)
        stride *= 2
    return rows


def rotated_channels(head_dim: int) -> int:
    """Return how many channels :func:`rotate` mixes: the largest power of two in ``head_dim``."""
    return head_dim & -head_dim


def quantise_dynamic(rows: torch.Tensor) -> DynamicRows:
    """Quantise ``[..., head_dim]`` by the largest element of each row."""
    x = rows.float()
    finite = x.isfinite().all(-1)
    scales, inverse = _scales(x.abs().amax(-1) / MAX_CODE)
    codes = (x * inverse[..., None]).round().clamp(-MAX_CODE, MAX_CODE)
    codes = codes.masked_fill(~finite[..., None], 0.0)
    return DynamicRows(codes.to(torch.int8), scales.masked_fill(~finite, torch.nan))


def quantise_static(rows: torch.Tensor, channel_scales: torch.Tensor) -> StaticRows:
    """Quantise ``[..., head_dim]`` by ``channel_scales``, which broadcast against it.

    What lies beyond 127 scales saturates; NaN becomes 0.
    """
    scaled = rows.float() * (1.0 / channel_scales)
    wanted = scaled.round()
    codes = wanted.clamp(-MAX_CODE, MAX_CODE).nan_to_num(0.0)
    inside = wanted.abs() <= MAX_CODE  # false for NaN
    return StaticRows(codes.to(torch.int8), scaled - codes, ~inside.all(-1))


def outliers(
    rows: torch.Tensor, residual: torch.Tensor, channel_scales: torch.Tensor, threshold: float
) -> torch.Tensor:
    """Say of each row whether its relative error ``|x - x'| / |x|`` exceeds a threshold.

    A row with a NaN or an infinity is none: no patch can mend it.

    Args:
        rows: ``[..., head_dim]``.
        residual: of :func:`quantise_static`.
        channel_scales: as there.
        threshold: tau, not negative.

    Returns:
        Bool ``[...]``.
    """
    error = (residual * channel_scales).square().sum(-1)
    return error > threshold * threshold * rows.float().square().sum(-1)


def encode_patches(residual: torch.Tensor, code: PatchCode) -> Patches:
    """Code residuals ``[..., head_dim]`` in 4 bits, in units of a scale per row."""
    scales, inverse = _scales(residual.abs().amax(-1) / MAX_PATCH_VALUE[code])
    units = residual * inverse[..., None]
    if code is PatchCode.INT4:
        nibbles = units.round().clamp(-7, 7).to(torch.int16) & 15
    else:
        midpoints = torch.tensor(_E3M0_MIDPOINTS)
        exponents = torch.bucketize(units.abs().contiguous(), midpoints)  # midpoints < value
        nibbles = exponents | ((units < 0) & (exponents > 0)) * 8
    columns = residual.shape[-1]
    padding = padded_head_dim(columns, 1) - columns
    pairs = torch.nn.functional.pad(nibbles, (0, padding)).unflatten(-1, (-1, 2))
    return Patches((pairs[..., 0] | pairs[..., 1] << 4).to(torch.uint8), scales)


def decode_patches(
    patches: Patches, code: PatchCode, head_dim: int, dtype: torch.dtype = torch.float32
) -> torch.Tensor:
    """Return the residuals ``[..., head_dim]`` that patches stand for."""
    packed = patches.codes
    nibbles = torch.stack((packed & 15, packed >> 4), -1).flatten(-2)[..., :head_dim].long()
    if code is PatchCode.INT4:
        values = ((nibbles ^ 8) - 8).to(dtype)
    else:
        magnitude = torch.tensor([0, 1, 2, 4, 8, 16, 32, 64], dtype=dtype)[nibbles & 7]
        values = torch.where(nibbles >= 8, -magnitude, magnitude)
    return values * patches.scales.to(dtype)[..., None]


def valid_tags(
    tags: torch.Tensor, slot: torch.Tensor, slots: int, tokens: torch.Tensor | int
) -> torch.Tensor:
    """Say which tags name a token of their own slot, and one of the first ``tokens`` of the block.

    Args:
        tags: int16, ``n + 1`` for token ``n``; anything in unwritten slots.
        slot: where each tag lies; broadcasts against ``tags``.
        slots: of the pool.
        tokens: how many tokens of the block count; broadcasts too.
    """
    token = tags.long() - 1
    return (token >= 0) & (token < tokens) & (token.remainder(slots) == slot)


def dequantise_pages(
    pages: torch.Tensor,
    layout: PageLayout,
    channel_scales: torch.Tensor | None = None,
    dtype: torch.dtype = torch.float32,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the values that int8 pages stand for; garbage where no token was written.

    Args:
        pages: int8 ``[num_blocks, num_kv_heads, block_size, content]``.
        layout: their byte map.
        channel_scales: C8S and C8P: float32 ``[2, num_kv_heads, head_dim]``, K first.
        dtype: type of the arithmetic and of the result.

    Returns:
        K and V, each ``[num_blocks, num_kv_heads, block_size, head_dim]``.

    Raises:
        ValueError: ``channel_scales`` are needed and missing.
    """
    key, value = (
        from_nz(plane)[..., : layout.head_dim].to(dtype) for plane in page_planes(pages, layout)
    )
    if layout.quantisation == Quantisation.C8D:
        # [num_blocks, num_kv_heads, block_size, 1]
        k_scales, v_scales = (scales.to(dtype)[..., None] for scales in page_scales(pages, layout))
        key = rotate(key * k_scales) / rotated_channels(layout.head_dim)
        return key, value * v_scales
    if channel_scales is None:
        raise ValueError("pages with static scales need channel_scales; give the layer's.")
    if layout.quantisation == Quantisation.C8P:
        for plane, pool in zip((key, value), page_patches(pages, layout), strict=True):
            _add_patches(plane, pool, layout)
    k_channels, v_channels = channel_scales.to(dtype)[:, :, None, :]  # [kv_heads, 1, head_dim]
    return key * k_channels, value * v_channels


def _add_patches(plane: torch.Tensor, pool: PatchPool, layout: PageLayout) -> None:
    """Add residuals, in units of the channels' scales, to codes ``[..., block_size, head_dim]``."""
    slots = layout.patch_slots
    valid = valid_tags(pool.tags, torch.arange(slots), slots, layout.block_size)
    block, head, slot = valid.nonzero(as_tuple=True)
    token = pool.tags[block, head, slot].long() - 1
    patches = Patches(pool.codes[block, head, slot], pool.scales[block, head, slot])
    code = PatchCode(layout.patch_code)
    # A tag belongs to one slot, so no token is named twice.
    plane[block, head, token] += decode_patches(patches, code, layout.head_dim, plane.dtype)


def _scales(wanted: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return scales, 0 where too small, and their reciprocals, 0 there too."""
    scales = wanted.masked_fill(wanted < SMALLEST_SCALE, 0.0)
    return scales, (1.0 / scales).masked_fill(scales == 0.0, 0.0)
