"""Quantises single matrices and writes them as the real tools do; nothing here uses the plugin.

Each maker takes a weight ``[n, k]`` and gives what a file holds, what the weight then is, and what
becomes of an input. Layouts: msmodelslim 26.1.0, compressed-tensors 0.17, AutoAWQ and GPTQModel.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch

Fake = Callable[[torch.Tensor], torch.Tensor]


@dataclass(slots=True, eq=False)
class Made:
    """A quantised module: tensors by role, the weight they mean, and what its input becomes."""

    tensors: dict[str, torch.Tensor]
    weight: torch.Tensor
    fake: Fake | None = None
    types: dict[str, str] = field(default_factory=dict)


Maker = Callable[[torch.Tensor, "torch.Tensor | None", str], Made]

#: Largest input of a module that static scales cover, by the end of its name.
RANGES = {"o_proj": 1.6, "down_proj": 3.0}


def quantise(
    weight: torch.Tensor, bits: int, group: int | None, symmetric: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return signed codes ``[n, k]``, scales and zeros ``[n, groups]``, and the float64 weight."""
    n, k = weight.shape
    parts = weight.double().reshape(n, -1, group or k)  # [n, groups, group]
    low, high = -(1 << (bits - 1)), (1 << (bits - 1)) - 1
    if symmetric:
        scale = parts.abs().amax(-1) / high
        zero = torch.zeros_like(scale)
    else:
        floor, ceiling = parts.amin(-1).clamp(max=0), parts.amax(-1).clamp(min=0)
        scale = (ceiling - floor) / (high - low)
        zero = (low - floor / scale).round().clamp(low, high)
    scale = scale.float().double()
    codes = (parts / scale[..., None] + zero[..., None]).round().clamp(low, high)
    whole = ((codes - zero[..., None]) * scale[..., None]).reshape(n, k)
    return codes.reshape(n, k).to(torch.int8), scale, zero, whole


def rounded_scales(
    codes: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor, dtype: torch.dtype
):
    """Return the scales in a file's type, and the weight that they make."""
    stored = scale.to(dtype)
    n, k = codes.shape
    parts = codes.double().reshape(n, scale.shape[1], -1) - zero[..., None]
    return stored, (parts * stored.double()[..., None]).reshape(n, k)


def fake_dynamic(symmetric: bool = True) -> Fake:
    """Return what quantising an input per token does."""

    def fake(x: torch.Tensor) -> torch.Tensor:
        x = x.float()
        if symmetric:
            scale = x.abs().amax(-1, keepdim=True) / 127
            return ((x / scale).round().clamp(-128, 127) * scale).double()
        low, high = x.amin(-1, keepdim=True), x.amax(-1, keepdim=True)
        scale = (high - low) / 255
        zero = (-128 - low / scale).round()
        return (((x / scale).round() + zero).clamp(-128, 127) - zero).mul(scale).double()

    return fake


def fake_static(scale: float, zero: int) -> Fake:
    """Return what quantising an input with fixed numbers does."""

    def fake(x: torch.Tensor) -> torch.Tensor:
        codes = (x.float() / scale + zero).round().clamp(-128, 127)
        return ((codes - zero) * scale).double()

    return fake


def input_numbers(name: str, symmetric: bool) -> tuple[float, int]:
    """Return scale and zero point of a module's input."""
    scale = torch.tensor(RANGES.get(name.rpartition(".")[2], 5.0) / 127).item()
    return float(torch.tensor(scale, dtype=torch.float32)), 0 if symmetric else 7


# ---- compressed-tensors ----


def pack_rows(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """Pack signed codes along the rows into int32, plus half of their range, low bits first."""
    count = 32 // bits
    unsigned = codes.long() + (1 << (bits - 1))
    unsigned = torch.nn.functional.pad(unsigned, (0, -unsigned.shape[1] % count))
    words = sum(unsigned[:, i::count] << (bits * i) for i in range(count))
    return (words - ((words >> 31) << 32)).to(torch.int32)


def compressed_packed(bits: int, group: int | None, symmetric: bool) -> Maker:
    """``pack-quantized``, as W4A16 and W8A16 are written."""

    def make(weight: torch.Tensor, bias: torch.Tensor | None, name: str) -> Made:
        codes, scale, zero, _ = quantise(weight, bits, group, symmetric)
        stored, whole = rounded_scales(codes, scale, zero, torch.bfloat16)
        tensors = {
            "weight_packed": pack_rows(codes, bits),
            "weight_scale": stored,
            "weight_shape": torch.tensor(weight.shape),
        }
        if not symmetric:
            packed = pack_rows(zero.to(torch.int8).T.contiguous(), bits).T.contiguous()
            tensors["weight_zero_point"] = packed
        return Made(tensors, whole)

    return make


def compressed_int(
    bits: int, group: int | None = None, static: bool = False, symmetric: bool = True
) -> Maker:
    """``int-quantized``: W8A8 of all kinds, and W4A8 with its codes in int8."""

    def make(weight: torch.Tensor, bias: torch.Tensor | None, name: str) -> Made:
        codes, scale, zero, _ = quantise(weight, bits, group, True)
        stored, whole = rounded_scales(codes, scale, zero, torch.bfloat16)
        tensors = {"weight": codes, "weight_scale": stored}
        if not static:  # beside 4-bit weights inputs stay as they are
            return Made(tensors, whole, fake_dynamic(symmetric) if bits == 8 else None)
        input_scale, input_zero = input_numbers(name, symmetric)
        tensors["input_scale"] = torch.tensor([input_scale])
        if not symmetric:
            tensors["input_zero_point"] = torch.tensor([input_zero], dtype=torch.int8)
        return Made(tensors, whole, fake_static(input_scale, input_zero))

    return make


# ---- ModelSlim ----


def modelslim_static(deq_type: torch.dtype = torch.float32, mixed: bool = False) -> Maker:
    """W8A8 with offset, and W8A8_MIX."""
    kind = "W8A8_MIX" if mixed else "W8A8"

    def make(weight: torch.Tensor, bias: torch.Tensor | None, name: str) -> Made:
        codes, scale, _, whole = quantise(weight, 8, None, True)
        input_scale, offset = input_numbers(name, False)
        deq = (torch.tensor(input_scale) * scale.float()).squeeze(1)
        first = torch.zeros(len(codes)) if bias is None else bias.float()
        correction = codes.float().sum(1) * offset
        tensors = {
            "weight": codes,
            "input_scale": torch.tensor([input_scale]),
            "input_offset": torch.tensor([float(offset)]),
            "quant_bias": (first / deq - correction).round().to(torch.int32),
            "deq_scale": deq
            if deq_type == torch.float32
            else deq.view(torch.int32).to(torch.int64),
        }
        fake = fake_static(input_scale, offset)
        if mixed:
            tensors["weight_scale"] = scale.float()
            tensors["weight_offset"] = torch.zeros_like(scale).float()
            fake = fake_dynamic()
        return Made(tensors, whole, fake, dict.fromkeys(tensors, kind))

    return make


def modelslim_scaled(
    kind: str, bits: int, group: int | None = None, symmetric: bool = True, packing: str = ""
) -> Maker:
    """W8A8_DYNAMIC, W8A16, W4A16 and W4A8_DYNAMIC with one scale."""

    def make(weight: torch.Tensor, bias: torch.Tensor | None, name: str) -> Made:
        codes, scale, zero, whole = quantise(weight, bits, group, symmetric)
        stored = codes
        if packing == "in":
            stored = (codes[:, 1::2] << 4) | (codes[:, 0::2] & 15)
        elif packing == "out":
            stored = (codes[1::2] << 4) | (codes[0::2] & 15)
        tensors = {
            "weight": stored.contiguous(),
            "weight_scale": scale.float(),
            "weight_offset": zero.float(),
        }
        if kind == "W4A8_DYNAMIC":
            tensors["scale_bias"] = 8 * whole.sum(1, keepdim=True).float()
        return Made(
            tensors,
            whole,
            fake_dynamic() if kind == "W8A8_DYNAMIC" and not group else None,
            dict.fromkeys(tensors, kind),
        )

    return make


def modelslim_two_levels(group: int) -> Maker:
    """W4A8_DYNAMIC by way of 8 bits per channel: 4-bit codes of 8-bit codes, per group."""

    def make(weight: torch.Tensor, bias: torch.Tensor | None, name: str) -> Made:
        eight, first, _, _ = quantise(weight, 8, None, True)
        codes, second, zero, _ = quantise(eight.float(), 4, group, True)
        stored, whole = rounded_scales(codes, second, zero, torch.float32)
        whole = whole * first.float().double()
        tensors = {
            "weight": ((codes[1::2] << 4) | (codes[0::2] & 15)).contiguous(),
            "weight_scale": first.float(),
            "weight_offset": torch.zeros_like(first).float(),
            "weight_scale_second": stored,
            "weight_offset_second": torch.zeros_like(stored),
            "scale_bias": 8 * whole.sum(1, keepdim=True).float(),
        }
        return Made(tensors, whole, None, dict.fromkeys(tensors, "W4A8_DYNAMIC"))

    return make


def modelslim_float(weight: torch.Tensor, bias: torch.Tensor | None, name: str) -> Made:
    """A module that stays float."""
    return Made({"weight": weight}, weight.double(), None, {"weight": "FLOAT"})


# ---- GPTQ and AWQ ----


def gptq(
    bits: int, group: int | None, symmetric: bool, version: int = 1, act_order: bool = False
) -> Maker:
    """``qweight``, ``qzeros``, ``scales`` and ``g_idx``."""

    def make(weight: torch.Tensor, bias: torch.Tensor | None, name: str) -> Made:
        k = weight.shape[1]
        order = torch.arange(k)
        if act_order:
            order = torch.randperm(k, generator=torch.Generator().manual_seed(k))
        codes, scale, zero, _ = quantise(weight[:, order], bits, group, symmetric)
        stored, whole = rounded_scales(codes, scale, zero, torch.float16)
        back = torch.argsort(order)
        codes, whole = codes[:, back], whole[:, back]
        half = 1 << (bits - 1)
        lacking = 1 if version == 1 else 0
        unsigned = (zero.long() + half - lacking) & ((1 << bits) - 1)  # [n, groups]
        tensors = {
            "qweight": pack_rows(codes, bits).T.contiguous(),
            "qzeros": pack_rows((unsigned.T - half).to(torch.int16), bits).contiguous(),
            "scales": stored.T.contiguous(),
            "g_idx": (torch.arange(k) // (group or k))[back].to(torch.int32),
        }
        return Made(tensors, whole)

    return make


def awq(group: int | None) -> Maker:
    """AutoAWQ's GEMM packing."""

    def pack(codes: torch.Tensor) -> torch.Tensor:  # [rows, columns] unsigned
        out = torch.zeros(codes.shape[0], codes.shape[1] // 8, dtype=torch.int64)
        for i, place in enumerate((0, 2, 4, 6, 1, 3, 5, 7)):
            out |= codes[:, place::8].long() << (4 * i)
        return (out - ((out >> 31) << 32)).to(torch.int32)

    def make(weight: torch.Tensor, bias: torch.Tensor | None, name: str) -> Made:
        codes, scale, zero, _ = quantise(weight, 4, group, False)
        stored, whole = rounded_scales(codes, scale, zero, torch.float16)
        tensors = {
            "qweight": pack(codes.T.long() + 8),
            "qzeros": pack(zero.T.long() + 8),
            "scales": stored.T.contiguous(),
        }
        return Made(tensors, whole)

    return make


# ---- rotations ----


def sylvester(size: int) -> torch.Tensor:
    """Return the Hadamard matrix of a power of two, float64, of 1 and -1."""
    matrix = torch.ones(1, 1, dtype=torch.float64)
    while matrix.shape[0] < size:
        matrix = torch.kron(torch.tensor([[1.0, 1], [1, -1]], dtype=torch.float64), matrix)
    return matrix


def random_hadamard(size: int, seed: int = 3) -> torch.Tensor:
    """Return a Hadamard matrix that is neither symmetric nor Sylvester's."""
    generator = torch.Generator().manual_seed(seed)
    signs = torch.randint(0, 2, (size,), generator=generator).double() * 2 - 1
    return (sylvester(size) * signs)[torch.randperm(size, generator=generator)]


def rotated(maker: Maker, side: str, block: torch.Tensor) -> Maker:
    """Quantise a weight whose input or output an orthogonal block rotates at run time."""

    def make(weight: torch.Tensor, bias: torch.Tensor | None, name: str) -> Made:
        features = weight.shape[1] if side == "input" else weight.shape[0]
        whole = torch.block_diag(*[block] * (features // block.shape[0]))
        if side == "input":  # (x B) (W B)^T = x W^T
            made = maker((weight.double() @ whole).float(), bias, name)
            made.weight = made.weight @ whole.T
        else:  # (x (B W)^T) B = x W^T
            made = maker((whole @ weight.double()).float(), bias, name)
            made.weight = whole.T @ made.weight
        return made

    return make
