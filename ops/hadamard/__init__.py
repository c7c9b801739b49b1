"""Rotation by a Hadamard matrix: what spreads outliers before quantisation, online."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from .. import checks, linear_checks
from ..dispatch import Implementation, Operator
from ..library import needs_dispatcher, register
from . import native, reference
from .matrices import base_for, known_orders

__all__ = ["SCHEMA", "HadamardRequest", "hadamard", "known_orders", "operator"]

SCHEMA = "hadamard(Tensor x, Tensor? base, int block, float scale) -> Tensor"


@dataclass(frozen=True, slots=True)
class HadamardRequest:
    """What an implementation must know of a call to say whether it can serve it."""

    dtype: torch.dtype
    d: int
    block: int
    order: int


operator: Operator[HadamardRequest] = Operator(
    "hadamard",
    (
        Implementation("native", native.supports, load=native.load),
        Implementation("reference", reference.supports, load=reference.load),
    ),
)


def hadamard(
    x: torch.Tensor,
    block: int | None = None,
    base: torch.Tensor | None = None,
    normalise: bool = True,
) -> torch.Tensor:
    """Rotate each run of ``block`` columns: ``y = (base (x) S) x``.

    ``(x)`` is Kronecker's product, S Sylvester's matrix of 2^p, whose index runs fastest. This is
    the order of QuaRot (arXiv:2404.00456) and of compressed-tensors' ``random_hadamard_matrix``.
    Computed in float32 and rounded once.

    Args:
        x: float32, float16 or bfloat16 ``[..., d]``.
        block: columns that are mixed with each other; they divide d. None: d.
        base: float32 ``[order, order]``, contiguous; ``block / order`` must be a power of two.
            None: 1 where ``block`` is a power of two, else Paley's matrix of a fitting order
            (:func:`known_orders`).
        normalise: divide by the square root of ``block``: the rotation is orthogonal then.

    Returns:
        Of the shape and type of ``x``, contiguous.

    Raises:
        ValueError: a shape or type is not as above, or no matrix of the size is known.
    """
    size = x.shape[-1] if block is None else block
    matrix = base_for(size) if base is None else base
    scale = size**-0.5 if normalise else 1.0
    rows = x.reshape(-1, x.shape[-1])
    call = torch.ops.ascend_plugin.hadamard if needs_dispatcher(x) else _cpu
    out: torch.Tensor = call(rows, matrix, size, scale)
    return out.view(x.shape)


def _cpu(x: torch.Tensor, base: torch.Tensor | None, block: int, scale: float) -> torch.Tensor:
    signature = (
        x.dtype,
        x.shape[1:],
        x.stride()[1:],
        base is None or checks.kind(base),
        block,
    )
    kernel = operator.kernel(signature)
    if kernel is None:
        check(x, base, block)
        order = 1 if base is None else base.shape[0]
        request = HadamardRequest(x.dtype, x.shape[1], block, order)
        kernel = operator.load(signature, request)
    out = torch.empty(x.shape, dtype=x.dtype)
    if x.shape[0]:
        kernel(x, base, out, block, scale)
    return out


def check(x: torch.Tensor, base: torch.Tensor | None, block: int) -> None:
    """Refuse arguments of other shapes and types.

    Raises:
        ValueError: see :func:`hadamard`.
    """
    linear_checks.check_rows("x", x)
    checks.check_float("x", x.dtype)
    if block < 1 or x.shape[1] % block:
        raise ValueError(
            f"block={block} does not divide the {x.shape[1]} columns of x; give a divisor, such as "
            "the transform_block_size of the checkpoint."
        )
    order = 1
    if base is not None:
        order = base.shape[0] if base.dim() else 0
        if base.dtype != torch.float32 or list(base.shape) != [order, order] or order < 1:
            raise ValueError(
                f"base must be a square float32 matrix, got {base.dtype} {list(base.shape)}; "
                "convert it with .float()."
            )
        if not base.is_contiguous():
            raise ValueError("base must be contiguous; call .contiguous().")
    inner = block // order
    if block % order or inner & (inner - 1):
        raise ValueError(
            f"block={block} is not {order} (the order of base) times a power of two; give a base "
            "whose order fits."
        )


def _fake(x: torch.Tensor, base: torch.Tensor | None, block: int, scale: float) -> torch.Tensor:
    return x.new_empty(x.shape)


register(SCHEMA, cpu=_cpu, fake=_fake)
