"""What the NPU's operators for integer weights take, as answers that need no NPU.

Plans and reports ask here too, on machines without torch_npu. Sources: the documentation of
``npu_quant_matmul``, ``npu_weight_quant_batchmatmul``, ``npu_grouped_matmul``,
``npu_dynamic_quant`` and ``npu_quantize`` in op-plugin (``docs/zh/custom_APIs/torch_npu``), and of
``aclnnWeightQuantBatchMatmulV2`` (ops-nn) and ``aclnnGroupedMatmulV5`` (ops-transformer) in CANN.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from .dispatch import Support
from .packed_weight import GROUP_MULTIPLE

if TYPE_CHECKING:
    from .dynamic_quant import QuantRequest
    from .hadamard import HadamardRequest
    from .quant_matmul import Int8Request
    from .static_quant import StaticRequest
    from .weight_quant_matmul import LinearRequest

#: Types of activations.
DTYPES = (torch.bfloat16, torch.float16)

#: Input and output features of one product.
MAX_FEATURES = 65535

#: 4-bit codes of an int32, along the last dimension of the tensor in memory.
CODES_PER_WORD = 8

#: Columns that one product of a Hadamard rotation mixes; larger blocks take two products.
MAX_HADAMARD = 1024

#: Experts of one grouped product.
MAX_EXPERTS = 1024


def quant_matmul(request: Int8Request) -> Support:
    """Say whether ``npu_quant_matmul`` serves a product of int8 matrices, and how."""
    if request.zeros:
        return Support(False, "npu_quant_matmul knows no zero points of rows")
    refused = _float(request.out_dtype) or _features(request.n, request.k)
    if refused:
        return refused
    order = "NZ" if whole_fractals(request.n, request.k) else "ND"
    if request.out_dtype == torch.bfloat16:
        return Support(True, f"npu_quant_matmul, weights in {order} order, scales in float32")
    return Support(
        True,
        f"npu_quant_matmul, weights in {order} order, scales in float32; rows without a scale get "
        "1, without which float16 results would be scaled by 19 bits alone",
    )


def whole_fractals(n: int, k: int) -> bool:
    """Say whether int8 ``[k, n]`` is whole fractals of 16 rows of 32 bytes."""
    return k % 16 == 0 and n % 32 == 0


def weight_quant_matmul(request: LinearRequest) -> Support:
    """Say whether ``npu_weight_quant_batchmatmul`` serves a product, and how."""
    refused = _float(request.dtype) or _features(request.n, request.k)
    if refused:
        return refused
    grouped = request.group != request.k
    if grouped and request.group % GROUP_MULTIPLE:
        return Support(
            False, f"groups of {request.group}: allowed are multiples of {GROUP_MULTIPLE}"
        )
    if request.bits == 4:
        inner, name = (request.n, "output") if grouped else (request.k, "input")
        if inner % CODES_PER_WORD:
            return Support(
                False,
                f"{inner} {name} features of 4-bit codes: allowed are multiples of "
                f"{CODES_PER_WORD}, which an int32 holds",
            )
    # NZ weights are documented for whole graphs of torchair alone, not for single operators.
    order = "[k, n] for groups" if grouped else "transposed for a scale per column"
    return Support(True, f"npu_weight_quant_batchmatmul, ND weights {order}")


def dynamic_quant(request: QuantRequest) -> Support:
    """Say whether ``npu_dynamic_quant`` serves rows."""
    if not request.symmetric:
        return Support(False, "zero points of rows are not whole numbers in the NPU's operator")
    return _float(request.dtype) or Support(True, "npu_dynamic_quant")


def static_quant(request: StaticRequest) -> Support:
    """Say whether ``npu_quantize`` serves rows with given numbers."""
    refused = _float(request.dtype)
    if refused:
        return refused
    if request.factor_dtype != request.dtype:
        return Support(
            False,
            f"factor and zero are {request.factor_dtype}; npu_quantize wants the input's type "
            f"{request.dtype}",
        )
    return Support(True, "npu_quantize, which multiplies")


def hadamard(request: HadamardRequest) -> Support:
    """Say how a rotation by Hadamard matrices runs: as matrix products."""
    refused = _float(request.dtype)
    if refused:
        return refused
    if request.block <= MAX_HADAMARD:
        return Support(True, f"one product with the matrix of {request.block}")
    if request.block > MAX_HADAMARD**2 or request.order > MAX_HADAMARD:
        return Support(False, f"blocks of {request.block} take matrices beyond {MAX_HADAMARD}")
    return Support(True, "two products, rounded between them")


@dataclass(frozen=True, slots=True)
class ExpertsRequest:
    """What is known of the experts of a layer.

    Attributes:
        dtype: of the activations.
        experts: how many.
        n: output features of one.
        k: input features of one.
        group: input features that share a scale; k: a scale per output feature.
        bits: of a code.
        int8_input: inputs are quantised per token.
        zeros: weights have zero points.
    """

    dtype: torch.dtype
    experts: int
    n: int
    k: int
    group: int
    bits: int
    int8_input: bool
    zeros: bool


def experts(request: ExpertsRequest) -> Support:
    """Say whether ``npu_grouped_matmul`` serves experts, and how."""
    refused = _float(request.dtype) or _features(request.n, request.k)
    if refused:
        return refused
    if not 1 < request.experts <= MAX_EXPERTS:
        return Support(False, f"{request.experts} experts: allowed are 2 to {MAX_EXPERTS}")
    grouped = request.group != request.k
    if request.int8_input:
        # In ND order a bfloat16 result takes bfloat16 scales; in NZ order exact ones.
        return Support(True, "npu_grouped_matmul, int8 by int8, weights in NZ order")
    if request.bits == 8 and grouped:
        return Support(False, "npu_grouped_matmul takes 8-bit weights with a scale per column only")
    if request.bits == 4 and request.n % CODES_PER_WORD:
        return Support(
            False,
            f"{request.n} output features of 4-bit codes: allowed are multiples of "
            f"{CODES_PER_WORD}, which an int32 holds",
        )
    if request.zeros and grouped:
        # Documented with zero points: a scale per column. Those of groups are multiplied apart.
        return Support(True, "npu_grouped_matmul, antiquant; zero points of groups in a second one")
    return Support(True, "npu_grouped_matmul, antiquant")


def _float(dtype: torch.dtype) -> Support | None:
    if dtype in DTYPES:
        return None
    return Support(False, f"{dtype}: an NPU computes in {' or '.join(map(str, DTYPES))}")


def _features(n: int, k: int) -> Support | None:
    if max(n, k) <= MAX_FEATURES:
        return None
    return Support(False, f"{k} input and {n} output features: at most {MAX_FEATURES} are allowed")
