"""Latent attention (MLA) over planes, through the fused infer attention operator (FIA).

FIA takes the latents as keys and as values, and the rotary parts of queries and keys beside them.
Every token takes the weight-absorbed path; what is computed is in ``ops/mla_attention``.

Source of the constraints: :mod:`ops.npu_latents`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch_npu

from .. import npu_latents
from ..dispatch import Implementation, Operator, Support
from ..page_layout import Quantisation
from .attention import FUSED, Batch, FusedCall, masking
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
    if request.quantisation is not Quantisation.NONE:
        reasons.append(f"int8 latents ({request.quantisation.name.lower()})")
    return "; ".join(reasons)


def fused_support(request: LatentRequest) -> Support:
    """Say whether the fused operator reads the pages themselves, and why."""
    reasons = common_reasons(request)
    return Support(False, reasons) if reasons else Support(True, "the fused operator reads latents")


def write_support(request: LatentRequest) -> Support:
    """Say whether operators of torch_npu write tokens into planes, and why."""
    reasons = common_reasons(request)
    return Support(False, reasons) if reasons else Support(True, "scatter into NZ planes")


attention_operator: Operator[LatentRequest] = Operator(
    "mla_attention (npu)", (Implementation(FUSED, fused_support),)
)

write_operator: Operator[LatentRequest] = Operator(
    "mla_cache_write (npu)", (Implementation(FUSED, write_support),)
)


@dataclass(frozen=True, slots=True)
class LatentHead:
    """A layer's constants.

    Attributes:
        num_heads: query heads.
        scale: factor of the scores.
        quantisation: of the pages.
    """

    num_heads: int
    scale: float
    quantisation: Quantisation = Quantisation.NONE


def write(
    latents: torch.Tensor, rotary: torch.Tensor, planes: LatentPlanes, slots: torch.Tensor
) -> None:
    """Write tokens into the planes of one layer: one launch.

    Args:
        latents: ``[tokens, latent_dim]``, bfloat16 or float16, any strides.
        rotary: ``[tokens, rotary_dim]`` of the same type.
        planes: of the layer's pages.
        slots: int64 ``[tokens]``, ``block * block_size + offset``; negative: not written.
    """
    torch_npu.npu_scatter_pa_kv_cache(
        latents[:, None].contiguous(),
        rotary[:, None].contiguous(),
        planes.latents.flatten(1, 2),  # [blocks, latent_dim / C0, block_size, C0]
        planes.rotary.flatten(1, 2),
        slots,
        cache_mode="PA_NZ",
    )


def fused_call(
    query: torch.Tensor,
    query_rotary: torch.Tensor,
    planes: LatentPlanes,
    batch: Batch,
    head: LatentHead,
) -> FusedCall:
    """Return the call over pages without quantisation.

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
    return FusedCall((query.contiguous(), planes.latents, planes.latents), options)


def attend(
    query: torch.Tensor,
    query_rotary: torch.Tensor,
    planes: LatentPlanes,
    batch: Batch,
    head: LatentHead,
    out: torch.Tensor,
) -> None:
    """Attend ``[tokens, heads, latent_dim]`` to pages, into ``out``; arguments as above."""
    fused_call(query, query_rotary, planes, batch, head).run(batch, out)
