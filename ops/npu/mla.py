"""Latent attention (MLA) over planes, through the fused infer attention operator (FIA).

FIA takes the latents as keys and as values, and the rotary parts of queries and keys beside them.
Every token takes the weight-absorbed path; what is computed is in ``ops/mla_attention``.

FIA multiplies int8 latents only with int8 queries, and with one scale for all latents. So int8
pages are dequantised first, into pages of 16 bits for the longest sequence of the batch.

Source of the constraints: :mod:`ops.npu_latents`.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch_npu

from .. import npu_latents
from ..dispatch import Implementation, Operator, Support
from ..page_layout import Quantisation
from .attention import FUSED, GATHER, Batch, FusedCall, masking
from .latent_planes import LatentPlanes
from .write import DTYPES


@dataclass(frozen=True, slots=True)
class LatentRequest:
    """What the support query must know of a call.

    Attributes:
        dtype: of queries, or of the tokens to write.
        page_dtype: of the latents in pages.
        quantisation: of the latents in pages.
        num_heads: query heads; a write has none to name and says 1.
        latent_dim: elements of a latent.
        rotary_dim: elements of a rotary part.
        block_size: tokens in a block.
    """

    dtype: torch.dtype
    page_dtype: torch.dtype
    quantisation: Quantisation
    latent_dim: int
    rotary_dim: int
    block_size: int
    num_heads: int = 1


def common_reasons(request: LatentRequest) -> str:
    """Return why no path on the NPU serves a layer; empty: nothing speaks against it."""
    reasons = npu_latents.why_not(request.latent_dim, request.rotary_dim, request.num_heads)
    if request.dtype not in DTYPES:
        reasons.append(f"{request.dtype} tokens; allowed are bf16 and fp16")
    elif request.quantisation is Quantisation.NONE and request.page_dtype != request.dtype:
        reasons.append(f"{request.dtype} tokens and {request.page_dtype} pages differ")
    return "; ".join(reasons)


def fused_support(request: LatentRequest) -> Support:
    """Say whether the fused operator reads the pages themselves, and why."""
    reasons = common_reasons(request)
    if not reasons and request.quantisation is not Quantisation.NONE:
        reasons = "int8 latents, which the fused operator multiplies with int8 queries alone"
    return Support(False, reasons) if reasons else Support(True, "the fused operator reads latents")


def gather_support(request: LatentRequest) -> Support:
    """Say whether pages can be dequantised first, and why."""
    reasons = common_reasons(request)
    if not reasons and request.quantisation is Quantisation.NONE:
        reasons = "pages without quantisation need no dequantisation"
    return Support(not reasons, reasons or "latents are gathered and dequantised, then attended to")


def write_support(request: LatentRequest) -> Support:
    """Say whether operators of torch_npu write tokens into planes, and why."""
    reasons = common_reasons(request)
    how = "scattered into NZ planes"
    if request.quantisation is not Quantisation.NONE:
        how = f"quantised, then {how}"
    return Support(not reasons, reasons or how)


attention_operator: Operator[LatentRequest] = Operator(
    "mla_attention (npu)",
    (Implementation(FUSED, fused_support), Implementation(GATHER, gather_support)),
)

write_operator: Operator[LatentRequest] = Operator(
    "mla_cache_write (npu)", (Implementation(FUSED, write_support),)
)


@dataclass(frozen=True, slots=True, eq=False)
class LatentLayer:
    """What a layer's pages hold.

    Attributes:
        quantisation: of the latents.
        scales: C8S: float32 ``[latent_dim]``, on the device, what a code is worth.
        inverse: C8S: float32 ``[latent_dim]``, by which latents are multiplied.
    """

    quantisation: Quantisation = Quantisation.NONE
    scales: torch.Tensor | None = None
    inverse: torch.Tensor | None = None

    @classmethod
    def of(
        cls, quantisation: Quantisation, scales: torch.Tensor | None, device: torch.device
    ) -> LatentLayer:
        """Return a layer with static scales, float32 ``[latent_dim]``, or none, on a device."""
        if scales is None:
            return cls(quantisation)
        scales = scales.detach().to("cpu", torch.float32)
        return cls(quantisation, scales.to(device), (1.0 / scales).to(device))


@dataclass(frozen=True, slots=True)
class LatentHead:
    """A layer's constants.

    Attributes:
        num_heads: query heads.
        scale: factor of the scores.
        layer: what its pages hold.
    """

    num_heads: int
    scale: float
    layer: LatentLayer = field(default_factory=LatentLayer)


def write(
    latents: torch.Tensor,
    rotary: torch.Tensor,
    planes: LatentPlanes,
    slots: torch.Tensor,
    layer: LatentLayer,
) -> None:
    """Write tokens into the planes of one layer: one launch, and before it what quantises.

    Args:
        latents: ``[tokens, latent_dim]``, bfloat16 or float16, any strides.
        rotary: ``[tokens, rotary_dim]`` of the same type.
        planes: of the layer's pages.
        slots: int64 ``[tokens]``, ``block * block_size + offset``; negative: not written. With C8D,
            the scales of such tokens fall into token 0 of block 0, which no sequence may own.
        layer: what the pages hold.
    """
    if layer.quantisation is not Quantisation.NONE:
        latents = _codes(latents, planes, slots, layer)
        rotary = rotary.to(planes.rotary.dtype)
    # Rows of 32 bytes go where they go, whatever they hold: one launch serves int8 latents and
    # rotary parts of 16 bits, which must have one type.
    kept = planes.latents.dtype
    torch_npu.npu_scatter_pa_kv_cache(
        latents[:, None].contiguous(),
        rotary[:, None].contiguous().view(kept),
        planes.latents.flatten(1, 2),  # [blocks, latent_dim / C0, block_size, C0]
        planes.rotary.view(kept).flatten(1, 2),
        slots,
        cache_mode="PA_NZ",
    )


def _codes(
    latents: torch.Tensor, planes: LatentPlanes, slots: torch.Tensor, layer: LatentLayer
) -> torch.Tensor:
    """Return int8 codes of latents; store the scales of tokens that get their own."""
    if layer.inverse is not None:
        wide = latents.to(torch.float32)  # reciprocals in bfloat16 would be off by half a code
        found: torch.Tensor = torch_npu.npu_quantize(
            wide, layer.inverse, None, torch.qint8, -1, False
        )
        return found
    assert planes.scales is not None
    codes: torch.Tensor
    codes, scales = torch_npu.npu_dynamic_quant(latents.contiguous())
    planes.scales.view(-1).index_put_((slots.clamp(min=0),), scales)
    return codes


def fused_call(
    query: torch.Tensor,
    query_rotary: torch.Tensor,
    planes: LatentPlanes,
    batch: Batch,
    head: LatentHead,
) -> FusedCall:
    """Return the call over planes of 16-bit latents.

    Args:
        query: ``[tokens, heads, latent_dim]``; not contiguous: it is copied.
        query_rotary: ``[tokens, heads, rotary_dim]``, likewise.
        planes: of the layer's pages.
        batch: lengths, and ids of blocks.
        head: the layer's constants.
    """
    options: dict[str, Any] = {
        "query_rope": query_rotary.contiguous(),
        "key_rope": planes.rotary,
        "block_table": batch.blocks,
        "block_size": planes.block_size,
        "num_heads": head.num_heads,
        "num_key_value_heads": 1,
        "scale": head.scale,
        "input_layout": "TND",
    }
    options |= masking(query.device, batch.causal, 0)
    inputs = (query.contiguous(), planes.latents, planes.latents)
    return FusedCall(inputs, options, released=("query_rope",))


def dequantised(
    planes: LatentPlanes, batch: Batch, layer: LatentLayer, dtype: torch.dtype
) -> tuple[LatentPlanes, Batch]:
    """Return the pages of a batch in 16 bits, and the batch with its blocks among them.

    What lies beyond a sequence's end is anything, as in pages.

    Args:
        planes: int8 ones.
        batch: lengths, and ids of blocks.
        layer: what the pages hold.
        dtype: of the queries.
    """
    _, _, groups, size, c0 = planes.latents.shape
    width = max(1, -(-max(batch.seq_lens, default=0) // size))
    table = batch.blocks[:, :width]
    # Ids beyond a sequence's blocks are anything.
    blocks = table.flatten().clamp(0, planes.latents.shape[0] - 1)
    codes = planes.latents.index_select(0, blocks).to(torch.float32)
    if layer.scales is not None:
        scales = layer.scales.view(groups, 1, c0)
    else:
        assert planes.scales is not None
        scales = planes.scales.index_select(0, blocks)[:, None, None, :, None]
    wide = (codes * scales).to(dtype).unflatten(-1, (2, -1))  # [n, 1, groups, size, 2, 16]
    latents = wide.permute(0, 1, 2, 4, 3, 5).reshape(-1, 1, 2 * groups, size, c0 // 2)
    rotary = planes.rotary.index_select(0, blocks).to(dtype)
    own = torch.arange(blocks.shape[0], dtype=torch.int32, device=blocks.device)
    return LatentPlanes(latents, rotary), replace(batch, blocks=own.view(table.shape))


def attend(
    query: torch.Tensor,
    query_rotary: torch.Tensor,
    planes: LatentPlanes,
    batch: Batch,
    head: LatentHead,
    out: torch.Tensor,
) -> None:
    """Attend ``[tokens, heads, latent_dim]`` to pages, into ``out``; arguments as above."""
    if head.layer.quantisation is not Quantisation.NONE:
        planes, batch = dequantised(planes, batch, head.layer, query.dtype)
    fused_call(query, query_rotary, planes, batch, head).run(batch, out)
