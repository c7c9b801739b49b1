"""Mixtures of experts with integer weights on an NPU: products of runs of rows, by expert."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch_npu

from .. import npu_weights
from ..dispatch import Implementation, Operator
from ..npu_weights import ExpertsRequest
from .elementwise import swiglu
from .experts import COUNTS
from .quantised_linear import pack_words, to_nz

operator: Operator[ExpertsRequest] = Operator(
    "experts (npu)", (Implementation("npu", npu_weights.experts),)
)


@dataclass(frozen=True, slots=True)
class ExpertCodes:
    """The unpacked weight of one expert on this process.

    Attributes:
        codes: signed int8 ``[n, k]``.
        scales: float ``[n, k / group]``.
        zeros: int8 like ``scales``; None: 0.
    """

    codes: torch.Tensor
    scales: torch.Tensor
    zeros: torch.Tensor | None


@dataclass(frozen=True, slots=True)
class ExpertsWeight:
    """One weight of every expert of a layer, in the order of ``npu_grouped_matmul``.

    Attributes:
        weight: int8 ``[experts, k, n]``, in NZ order beside int8 inputs; int32
            ``[experts, k, n / 8]`` of 4-bit codes; or of 16 bits.
        scales: ``[experts, n]`` or ``[experts, k / group, n]``; None: of a float weight.
        offsets: minus the zero points, like ``scales``; None where inputs are int8.
        shifts: minus zero point times scale ``[experts, k / group, n]``, which sums of the inputs
            of a group are multiplied with; None: no zero points of groups.
        group: k that share a scale.
        int8_input: inputs are quantised per token.
    """

    weight: torch.Tensor
    scales: torch.Tensor | None
    offsets: torch.Tensor | None
    shifts: torch.Tensor | None
    group: int
    int8_input: bool


def pack_floats(weights: Sequence[torch.Tensor], device: torch.device) -> ExpertsWeight:
    """Put float weights ``[n, k]`` of every expert into the order of the products."""
    stacked = torch.stack([weight.t() for weight in weights]).contiguous().to(device)
    return ExpertsWeight(stacked, None, None, None, weights[0].shape[1], False)


def pack(
    experts: Sequence[ExpertCodes],
    *,
    bits: int,
    group: int,
    int8_input: bool,
    dtype: torch.dtype,
    device: torch.device,
) -> ExpertsWeight:
    """Put one weight of every expert into the order of the products, once at load.

    Args:
        experts: of one layer, all of one shape.
        bits: 4 or 8.
        group: k that share a scale; k: a scale per column.
        int8_input: inputs will be quantised per token: 8 bits, no groups, no zero points.
        dtype: of the activations.
        device: where the weight will lie.

    Raises:
        UnsupportedRequestError: the operator does not take such weights.
    """
    n, k = experts[0].codes.shape
    zeros = any(each.zeros is not None for each in experts)
    operator.choose(ExpertsRequest(dtype, len(experts), n, k, group, bits, int8_input, zeros))
    weight = torch.stack([_inner_first(each.codes, bits) for each in experts]).to(device)
    scales = torch.stack([each.scales.t() for each in experts]).float()  # [experts, groups, n]
    if int8_input:
        return ExpertsWeight(to_nz(weight), scales[:, 0].to(device), None, None, group, True)
    points = torch.zeros_like(scales)
    if zeros:
        points = torch.stack([_points(each) for each in experts])
    shifts = None
    if zeros and group != k:
        shifts = (-points * scales.to(dtype).float()).to(dtype).to(device)
        points = torch.zeros_like(scales)
    if group == k:
        scales, points = scales[:, 0], points[:, 0]
    offsets = (-points).to(dtype).contiguous().to(device)
    return ExpertsWeight(
        weight, scales.to(dtype).contiguous().to(device), offsets, shifts, group, False
    )


def _inner_first(codes: torch.Tensor, bits: int) -> torch.Tensor:
    rows = codes.t().contiguous()
    return rows if bits == 8 else pack_words(rows)


def _points(expert: ExpertCodes) -> torch.Tensor:
    """Return zero points as float32 ``[groups, n]``."""
    if expert.zeros is None:
        return torch.zeros_like(expert.scales.t(), dtype=torch.float32)
    return expert.zeros.t().float()


def swiglu_experts(
    x: torch.Tensor,
    gate_up: ExpertsWeight,
    down: ExpertsWeight,
    weights: torch.Tensor,
    experts: torch.Tensor,
) -> torch.Tensor:
    """Return the weighted sum of each token's experts, ``down(silu(gate(x)) * up(x))``.

    Shapes do not depend on the choice of experts, so graphs hold.

    Args:
        x: ``[tokens, hidden]``, bfloat16 or float16.
        gate_up: of :func:`pack` or :func:`pack_floats`, gate first.
        down: the same.
        weights: float32 ``[tokens, top_k]``.
        experts: int32 ``[tokens, top_k]``.

    Returns:
        ``[tokens, hidden]``, the dtype of ``x``.
    """
    count, scale, dtype = gate_up.weight.shape[0], None, x.dtype
    if gate_up.int8_input:
        # Before rows are copied to their experts: half the bytes, and each token once.
        x, scale = torch_npu.npu_dynamic_quant(x)
    rows, places, counts, scales = torch_npu.npu_moe_init_routing_v2(
        x,
        experts,
        scale=scale,
        active_num=experts.numel(),
        expert_num=count,
        expert_tokens_num_type=COUNTS,
        expert_tokens_num_flag=True,
        active_expert_range=[0, count],
        quant_mode=-1,
        row_idx_type=0,
    )
    inner = swiglu(_by_expert(rows, scales, gate_up, counts, dtype))
    scales = None
    if down.int8_input:
        inner, scales = torch_npu.npu_dynamic_quant(inner)
    outer = _by_expert(inner, scales, down, counts, dtype)
    out: torch.Tensor = torch_npu.npu_moe_token_unpermute(outer, places, weights.to(dtype))
    return out


def _by_expert(
    rows: torch.Tensor,
    scales: torch.Tensor | None,
    weight: ExpertsWeight,
    counts: torch.Tensor,
    dtype: torch.dtype,
) -> torch.Tensor:
    """Return ``[rows, n]``: each run of rows times its expert's weight."""
    if weight.int8_input:
        assert weight.scales is not None
        assert scales is not None
        factors = {"scale": [weight.scales], "per_token_scale": [scales]}
        return _grouped(rows, weight.weight, counts, dtype, **factors)
    if weight.scales is None or weight.offsets is None:
        return _grouped(rows, weight.weight, counts, dtype)
    out = _grouped(
        rows,
        weight.weight,
        counts,
        dtype,
        antiquant_scale=[weight.scales],
        antiquant_offset=[weight.offsets],
    )
    if weight.shifts is None:
        return out
    sums = rows.unflatten(-1, (-1, weight.group)).sum(-1)  # [rows, k / group]
    return out.add_(_grouped(sums, weight.shifts, counts, dtype))


def _grouped(
    rows: torch.Tensor,
    weight: torch.Tensor,
    counts: torch.Tensor,
    dtype: torch.dtype,
    **scales: list[torch.Tensor],
) -> torch.Tensor:
    out: torch.Tensor = torch_npu.npu_grouped_matmul(
        [rows],
        [weight],
        group_list=counts,
        split_item=2,
        group_type=0,
        group_list_type=COUNTS,
        output_dtype=dtype,
        **scales,
    )[0]
    return out
