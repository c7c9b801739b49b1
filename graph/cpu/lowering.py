"""Operators of torch and vLLM that a recorded step may use, and the native kernels they become.

A lowering takes the recording and the operator's arguments, computes with one native call, and
returns what the operator would return. Where a kernel does not take the arguments, it refuses.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from ascend_plugin.ops import native
from ascend_plugin.ops.dense_matmul import check_dense
from ascend_plugin.ops.native.abi import Elementwise
from ascend_plugin.ops.native.kernels import DTYPES

if TYPE_CHECKING:
    from .pool import Pool


class NotRecordable(RuntimeError):
    """A step does something that cannot be repeated as a native call; the message says what."""


@dataclass(slots=True)
class Recording:
    """What lowerings share.

    Attributes:
        pool: where memory comes from.
        widened: token ids that were converted, by their storage's address, with what they were
            converted from. The conversion is no step: the only reader takes either type.
        masks: the same of tests of positions for 0, whose only reader sees the positions.

    Both keep what they list: an address that was freed could be another tensor's.
    """

    pool: Pool
    widened: dict[int, tuple[torch.Tensor, torch.Tensor]] = field(default_factory=dict)
    masks: dict[int, tuple[torch.Tensor, torch.Tensor]] = field(default_factory=dict)


def storage_of(tensor: torch.Tensor) -> int:
    """Return the address of a tensor's storage, which its views share."""
    return tensor.untyped_storage().data_ptr()


def _source(
    known: dict[int, tuple[torch.Tensor, torch.Tensor]], tensor: torch.Tensor
) -> torch.Tensor | None:
    """Return what a tensor was computed from while recording; None: it is an input of the step.

    Raises:
        NotRecordable: it is a part of such a tensor.
    """
    if storage_of(tensor) not in known:
        return None
    made, source = known[storage_of(tensor)]
    if made.shape != tensor.shape or made.stride() != tensor.stride():
        raise NotRecordable("a part of converted token ids or of a mask")
    return source


def _require(holds: bool, what: str) -> None:
    if not holds:
        raise NotRecordable(what)


def collapse(tensor: torch.Tensor) -> torch.Tensor:
    """Return a tensor as rows: ``[m, k]`` with contiguous rows, without copying.

    Raises:
        NotRecordable: its strides do not allow that, or its type has no kernels.
    """
    if tensor.dtype not in DTYPES or tensor.dtype == torch.int8:
        raise NotRecordable(f"a tensor of {tensor.dtype}")
    if tensor.dim() == 2 and tensor.stride(1) == 1:
        return tensor
    if tensor.is_contiguous():
        return tensor.view(-1, tensor.shape[-1] if tensor.dim() else 1)
    # [m, heads, dim] cut out of a fused projection: the heads of a row lie side by side.
    if tensor.dim() == 3 and tensor.stride()[1:] == (tensor.shape[2], 1):
        return tensor.flatten(1)
    raise NotRecordable(f"a tensor of shape {list(tensor.shape)} with strides {tensor.stride()}")


def _empty(step: Recording, size: Any, dtype: torch.dtype | None = None, **_: Any) -> torch.Tensor:
    return step.pool.empty(tuple(size), dtype or torch.get_default_dtype())


def _empty_like(
    step: Recording, like: torch.Tensor, dtype: torch.dtype | None = None, **_: Any
) -> torch.Tensor:
    return step.pool.empty(tuple(like.shape), dtype or like.dtype)


def _new_empty(
    step: Recording, like: torch.Tensor, size: Any, dtype: torch.dtype | None = None, **_: Any
) -> torch.Tensor:
    return step.pool.empty(tuple(size), dtype or like.dtype)


def _reshape(step: Recording, tensor: torch.Tensor, shape: Any) -> torch.Tensor:
    try:
        return tensor.view(tuple(shape))
    except RuntimeError:
        return _copy(step, tensor).view(tuple(shape))


def _copy(step: Recording, tensor: torch.Tensor, **_: Any) -> torch.Tensor:
    return _unary(Elementwise.COPY)(step, tensor)


def _contiguous(step: Recording, tensor: torch.Tensor, **_: Any) -> torch.Tensor:
    return tensor if tensor.is_contiguous() else _copy(step, tensor)


def _to(
    step: Recording, tensor: torch.Tensor, dtype: torch.dtype, *_: Any, **__: Any
) -> torch.Tensor:
    if tensor.dtype == dtype:
        return tensor
    if (tensor.dtype, dtype) != (torch.int32, torch.int64):
        raise NotRecordable(f"a conversion of {tensor.dtype} to {dtype}")
    wide = tensor.to(dtype)
    step.widened[storage_of(wide)] = (wide, tensor)
    return wide


def _embedding(
    step: Recording, table: torch.Tensor, ids: torch.Tensor, padding: int = -1, *_: Any
) -> torch.Tensor:
    narrow = _source(step.widened, ids)
    ids = ids if narrow is None else narrow
    _require(ids.dtype in (torch.int32, torch.int64), f"an embedding by ids of {ids.dtype}")
    _require(ids.is_contiguous() and table.stride(1) == 1, "an embedding by strided ids")
    out = step.pool.empty((*ids.shape, table.shape[1]), table.dtype)
    native.embedding(native.load(), ids.view(-1), table, out.view(-1, table.shape[1]))
    return out


def _linear(
    step: Recording, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None
) -> torch.Tensor:
    rows = collapse(x)
    try:
        check_dense(rows, weight, bias)
    except ValueError as error:
        raise NotRecordable(str(error)) from error
    out = step.pool.empty((*x.shape[:-1], weight.shape[0]), x.dtype)
    native.dense(native.load(), rows, weight, bias, out.view(-1, weight.shape[0]))
    return out


def _unary(operation: Elementwise) -> Callable[..., torch.Tensor]:
    def lower(step: Recording, x: torch.Tensor) -> torch.Tensor:
        out = step.pool.empty(tuple(x.shape), x.dtype)
        rows = collapse(x)
        native.elementwise(native.load(), operation, rows, None, out.view(rows.shape))
        return out

    return lower


def _gelu(step: Recording, x: torch.Tensor, approximate: str = "none") -> torch.Tensor:
    operation = Elementwise.GELU if approximate == "none" else Elementwise.GELU_TANH
    return _unary(operation)(step, x)


def _binary(operation: Elementwise, in_place: bool = False) -> Callable[..., torch.Tensor]:
    def lower(step: Recording, x: torch.Tensor, y: Any, alpha: float = 1) -> torch.Tensor:
        if operation == Elementwise.MULTIPLY and _is_scalar(x, y):
            return _scale(step, x, y, in_place)
        alike = isinstance(y, torch.Tensor) and y.shape == x.shape and y.dtype == x.dtype
        if not alike or alpha != 1:
            raise NotRecordable(f"{operation.name.lower()} of operands that are not alike")
        out = x if in_place else step.pool.empty(tuple(x.shape), x.dtype)
        rows = collapse(x)
        others = (_as_rows(y, rows), _as_rows(out, rows))
        native.elementwise(native.load(), operation, rows, *others)
        return out

    return lower


def _is_scalar(x: torch.Tensor, y: Any) -> bool:
    """Say whether ``y`` is a number, or a tensor of one without dimensions, that scales ``x``."""
    if isinstance(y, torch.Tensor):
        return y.dim() == 0 and y.dtype == x.dtype
    return isinstance(y, (int, float))


def _scale(step: Recording, x: torch.Tensor, y: Any, in_place: bool) -> torch.Tensor:
    out = x if in_place else step.pool.empty(tuple(x.shape), x.dtype)
    rows = collapse(x)
    tensor, factor = (y, 1.0) if isinstance(y, torch.Tensor) else (None, float(y))
    native.elementwise(native.load(), Elementwise.SCALE, rows, tensor, _as_rows(out, rows), factor)
    return out


def _equal(step: Recording, x: torch.Tensor, value: Any) -> torch.Tensor:
    if value != 0 or x.dtype != torch.int64 or x.numel() != x.shape[0]:
        raise NotRecordable("a comparison that is not of positions with 0")
    mask = x == 0
    step.masks[storage_of(mask)] = (mask, x)
    return mask


def _where(step: Recording, mask: torch.Tensor, value: Any, x: torch.Tensor) -> torch.Tensor:
    """Clear the rows of ``x`` at position 0, as draft layers do with their embeddings."""
    positions = _source(step.masks, mask)
    if positions is None or value != 0 or mask.shape != (x.shape[0], 1) or x.dim() != 2:
        raise NotRecordable("a choice that does not clear rows at position 0")
    out = step.pool.empty(tuple(x.shape), x.dtype)
    rows = positions.view(-1)
    native.elementwise(native.load(), Elementwise.KEEP_ROWS, collapse(x), rows, out)
    return out


def _cat(step: Recording, tensors: list[torch.Tensor], dim: int = 0) -> torch.Tensor:
    first = tensors[0]
    if first.dim() != 2 or dim not in (1, -1) or any(t.shape[0] != first.shape[0] for t in tensors):
        raise NotRecordable(f"a concatenation along dimension {dim}")
    out = step.pool.empty((first.shape[0], sum(t.shape[1] for t in tensors)), first.dtype)
    for part, tensor in zip(out.split([t.shape[1] for t in tensors], 1), tensors, strict=True):
        native.elementwise(native.load(), Elementwise.COPY, collapse(tensor), None, part)
    return out


def _as_rows(tensor: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """Return a tensor as rows of the shape of others."""
    collapsed = tensor.view(rows.shape) if tensor.is_contiguous() else collapse(tensor)
    if collapsed.shape != rows.shape:
        raise NotRecordable(f"operands of shape {list(tensor.shape)} with unlike strides")
    return collapsed


def _rms_norm(
    step: Recording, out: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, epsilon: float
) -> None:
    width = weight.shape[0]
    alike = weight.dtype == x.dtype == out.dtype and weight.is_contiguous()
    _require(alike, f"a norm of {x.dtype} with weights of {weight.dtype}")
    rows = x.view(-1, width) if x.is_contiguous() else collapse(x)
    native.add_rms_norm(native.load(), rows, None, weight, epsilon, out.view(-1, width))


def _rotary_embedding(
    step: Recording,
    positions: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor | None,
    head_size: int,
    table: torch.Tensor,
    is_neox: bool,
    *rest: Any,
) -> None:
    _require(not any(rest), "rotary embedding of a part of the head")
    plain = positions.dim() == 1 and positions.dtype == torch.int64 and positions.is_contiguous()
    _require(plain, f"positions of {positions.dtype} {list(positions.shape)}")
    _require(table.dtype == query.dtype, f"angles of {table.dtype} for {query.dtype}")
    keys = None if key is None else _heads(key, head_size)
    native.rotary(native.load(), positions, _heads(query, head_size), keys, table, is_neox)


def _heads(tensor: torch.Tensor, head_size: int) -> torch.Tensor:
    return tensor if tensor.dim() == 3 else tensor.unflatten(-1, (-1, head_size))


#: By the name of the overload. The first argument of each is the recording.
LOWERINGS: dict[str, Callable[..., Any]] = {
    "aten.empty.memory_format": _empty,
    "aten.empty_like.default": _empty_like,
    "aten.new_empty.default": _new_empty,
    "aten.reshape.default": _reshape,
    "aten._unsafe_view.default": _reshape,
    "aten.clone.default": _copy,
    "aten.contiguous.default": _contiguous,
    "aten.to.dtype": _to,
    "aten.embedding.default": _embedding,
    "aten.linear.default": _linear,
    "aten.silu.default": _unary(Elementwise.SILU),
    "aten.gelu.default": _gelu,
    "aten.add.Tensor": _binary(Elementwise.ADD),
    "aten.add_.Tensor": _binary(Elementwise.ADD, in_place=True),
    "aten.cat.default": _cat,
    "aten.eq.Scalar": _equal,
    "aten.where.ScalarSelf": _where,
    "aten.mul.Tensor": _binary(Elementwise.MULTIPLY),
    "aten.mul_.Tensor": _binary(Elementwise.MULTIPLY, in_place=True),
    "_C.rms_norm.default": _rms_norm,
    "_C.rotary_embedding.default": _rotary_embedding,
}
