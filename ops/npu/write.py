"""Write K and V of new tokens into planes, quantised or not.

Int8 pages are written by the AscendC kernel where there is one: one launch, whatever the variant.
It also writes 16-bit rows that are not contiguous, such as V inside a fused projection; contiguous
ones go to torch_npu's scatter, which is one launch too. Without the kernel, operators of torch_npu
quantise first, and patches (C8P) cannot be written.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch_npu

from ..dispatch import Implementation, Operator, Support
from ..kv_cache_write import WriteRequest
from ..page_layout import Quantisation
from . import ascendc
from .ascendc import Int8Layer
from .hadamard import rotate
from .planes import Planes, plane_slots

#: Element types that the cube unit multiplies, and so the types of pages without quantisation.
DTYPES = (torch.bfloat16, torch.float16)


@dataclass(frozen=True, slots=True)
class ChannelScales:
    """Static scales of one layer as the operators take them.

    The fused attention reads them in bfloat16; codes are made with what that leaves.

    Attributes:
        key: bfloat16 ``[kv_heads, 1, head_dim]``, what a code of K is worth.
        value: the same of V.
        key_inverse: float32 ``[kv_heads * head_dim]``, by which K is multiplied.
        value_inverse: the same of V.
    """

    key: torch.Tensor
    value: torch.Tensor
    key_inverse: torch.Tensor
    value_inverse: torch.Tensor

    @classmethod
    def of(cls, channel_scales: torch.Tensor, device: torch.device) -> ChannelScales:
        """Return ``channel_scales``, float32 ``[2, kv_heads, head_dim]``, rounded, on a device."""
        rounded = channel_scales.detach().to("cpu", torch.bfloat16)
        inverse = (1.0 / rounded.float()).flatten(1).to(device)
        key, value = rounded[:, :, None].contiguous().to(device)
        return cls(key, value, inverse[0].contiguous(), inverse[1].contiguous())


def kernel_scales(channel_scales: torch.Tensor, quantisation: Quantisation) -> torch.Tensor:
    """Return the scales that the AscendC kernels take, float32 ``[2, kv_heads, head_dim]``.

    Those of C8S are rounded to bfloat16, in which the fused attention reads them (it may read the
    same pages). C8P is read by the kernels alone.
    """
    if quantisation is Quantisation.C8S:
        return channel_scales.to(torch.bfloat16).to(torch.float32)
    return channel_scales


@dataclass(frozen=True, slots=True)
class PlaneWriteRequest(WriteRequest):
    """What an implementation must know of a call, see :class:`WriteRequest`.

    Attributes:
        contiguous: whether key and value are.
    """

    contiguous: bool = True


def kernel_support(request: PlaneWriteRequest) -> Support:
    """Say whether the AscendC kernel writes tokens into planes, and why."""
    if request.quantisation is Quantisation.NONE:
        if request.contiguous:
            return Support(
                False, "contiguous 16-bit rows, which npu_scatter_pa_kv_cache writes in one launch"
            )
        if request.page_dtype != request.dtype:
            return Support(False, f"{request.dtype} keys and {request.page_dtype} pages differ")
    return ascendc.support(
        "kv_cache_write",
        request.quantisation,
        request.dtype,
        request.head_dim,
        request.block_size,
    )


def supports(request: PlaneWriteRequest) -> Support:
    """Say whether operators of torch_npu can write tokens into planes, and why."""
    if request.quantisation is Quantisation.C8P:
        return Support(False, "no operator of torch_npu writes patches (c8p); use c8s or c8d")
    if request.dtype not in DTYPES:
        return Support(False, f"{request.dtype} keys; the NPU's attention takes bf16 and fp16")
    if request.quantisation is Quantisation.NONE:
        if request.page_dtype != request.dtype:
            return Support(False, f"{request.dtype} keys and {request.page_dtype} pages differ")
        return Support(True, "scatter into NZ planes")
    if request.head_dim % 32:
        return Support(False, f"head dimension {request.head_dim} is no multiple of 32")
    if request.quantisation is Quantisation.C8S:
        return Support(True, "quantised per channel, then scattered into NZ planes")
    return Support(True, "rotated, quantised per token and head, then scattered into NZ planes")


operator: Operator[PlaneWriteRequest] = Operator(
    "kv_cache_write (npu)",
    (
        Implementation(ascendc.NAME, kernel_support),
        Implementation("npu", supports),
    ),
)


@dataclass(frozen=True, slots=True)
class Slots:
    """Where tokens go.

    Attributes:
        mapping: int64 ``[tokens]``, ``block * block_size + offset``; negative: not written.
        planes: the same among planes (:func:`plane_slots`), for torch_npu's operators; None: it is
            computed when they want it.
    """

    mapping: torch.Tensor
    planes: torch.Tensor | None = None

    def first(self, tokens: int) -> Slots:
        """Return the slots of the first tokens."""
        planes = None if self.planes is None else self.planes[:tokens]
        return Slots(self.mapping[:tokens], planes)


def write(
    key: torch.Tensor,
    value: torch.Tensor,
    planes: Planes,
    slots: Slots,
    layer: Int8Layer,
    scales: ChannelScales | None = None,
) -> None:
    """Write tokens into the planes of one layer, by the implementation that serves them.

    Args:
        key: ``[tokens, kv_heads, head_dim]``, bfloat16 or float16, any strides.
        value: the same shape and dtype.
        planes: of the layer's pages.
        slots: of the tokens.
        layer: what the pages hold.
        scales: C8S: the layer's, as operators of torch_npu take them.

    Raises:
        UnsupportedRequestError: nothing serves them.
    """
    _, kv_heads, head_dim = key.shape
    block_size = planes.key.shape[3]
    request = PlaneWriteRequest(
        key.dtype,
        planes.key.dtype,
        kv_heads,
        head_dim,
        block_size,
        layer.quantisation,
        key.is_contiguous() and value.is_contiguous(),
    )
    if operator.choose(request).implementation.name == ascendc.NAME:
        ascendc.write(key, value, planes, slots.mapping, layer)
        return
    places = plane_slots(slots.mapping, block_size) if slots.planes is None else slots.planes
    write_planes(key, value, planes, places, layer.quantisation, scales)


def write_planes(
    key: torch.Tensor,
    value: torch.Tensor,
    planes: Planes,
    slots: torch.Tensor,
    quantisation: Quantisation = Quantisation.NONE,
    scales: ChannelScales | None = None,
) -> None:
    """Write tokens into the planes of one layer with operators of torch_npu.

    Args:
        key: ``[tokens, kv_heads, head_dim]``, bfloat16 or float16, any strides.
        value: the same shape and dtype.
        planes: of the layer's pages.
        slots: int32 ``[tokens]``, of :func:`plane_slots`; negative: the token is not written. With
            C8D, the scales of such tokens fall into token 0 of block 0, which no sequence may own.
        quantisation: of the pages.
        scales: C8S: the layer's.
    """
    if quantisation is Quantisation.C8D:
        key, value = _dynamic(key, value, planes, slots)
    elif quantisation is Quantisation.C8S:
        if scales is None:
            raise ValueError("c8s pages need channel scales; give the layer's.")
        key, value = _static(key, scales.key_inverse), _static(value, scales.value_inverse)
    torch_npu.npu_scatter_pa_kv_cache(
        key.contiguous(),
        value.contiguous(),
        planes.key.flatten(1, 2),  # [P, kv_heads * head_dim / C0, block_size, C0]
        planes.value.flatten(1, 2),
        slots,
        cache_mode="PA_NZ",
    )


def _static(rows: torch.Tensor, inverse: torch.Tensor) -> torch.Tensor:
    """Return int8 codes of ``[tokens, kv_heads, head_dim]`` with one scale per channel.

    The operator wants scales of the rows' type. Reciprocals in bfloat16 would be off by as much as
    half a code, so the rows become float32, in the copy that makes them contiguous.
    """
    wide = rows.to(torch.float32).flatten(1)
    codes: torch.Tensor = torch_npu.npu_quantize(wide, inverse, None, torch.qint8, -1, False)
    return codes.view(rows.shape)


def _dynamic(
    key: torch.Tensor, value: torch.Tensor, planes: Planes, slots: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Write the scales of rows that get one each, and return their codes."""
    tokens, heads, head_dim = key.shape
    rows = torch.empty((2, tokens, heads, head_dim), dtype=key.dtype, device=key.device)
    rotate(key, out=rows[0])
    rows[1].copy_(value)
    codes, scales = torch_npu.npu_dynamic_quant(rows.view(-1, head_dim))
    _put_scales(planes, slots, scales.view(2, tokens, heads))
    key_codes, value_codes = codes.view(2, tokens, heads, head_dim)
    return key_codes, value_codes


def _put_scales(planes: Planes, slots: torch.Tensor, scales: torch.Tensor) -> None:
    """Store float32 ``[2 (K, V), tokens, kv_heads]``."""
    assert planes.scales is not None
    _, heads, size = planes.scales.shape
    device = scales.device
    slots = slots.clamp(min=0).to(torch.int64)
    plane = torch.div(slots, size, rounding_mode="floor")
    offset = slots - plane * size
    both = torch.arange(2, device=device)[:, None] + plane  # [2, tokens]
    index = (both[:, :, None], torch.arange(heads, device=device), offset[:, None])
    planes.scales.index_put_(index, scales)
