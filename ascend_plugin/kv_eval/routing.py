"""Transformers' attention, routed to a function of ours.

Models that follow transformers' attention interface look the function up by name, and hand it
queries and keys after rotary embedding: just what a KV cache is given.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch

from ascend_plugin.kv_eval.errors import KVEvalError

#: Name of our function in transformers' table.
NAME = "ascend_plugin_pages"


@dataclass(frozen=True, slots=True, eq=False)
class LayerCall:
    """One sequence in one attention layer.

    Attributes:
        layer: index of the layer.
        query: ``[tokens, heads, head_dim]``, after rotary embedding.
        key: ``[tokens, kv_heads, head_dim]``, after rotary embedding.
        value: ``[tokens, kv_heads, head_dim_v]``.
        scale: factor of the scores.
        window: tokens that a row sees, itself included; 0: all.
        soft_cap: bound of the scores; 0: none.
        sinks: float32 ``[heads]`` or None: logits of a key without a value.
    """

    layer: int
    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    scale: float
    window: int = 0
    soft_cap: float = 0.0
    sinks: torch.Tensor | None = None


#: Returns the attention's output, of the query's shape and dtype.
Hook = Callable[[LayerCall], torch.Tensor]

_hook: ContextVar[Hook] = ContextVar("ascend_plugin_attention_hook")


@contextmanager
def routed(hook: Hook) -> Iterator[None]:
    """Give every attention call inside to ``hook``."""
    token = _hook.set(hook)
    try:
        yield
    finally:
        _hook.reset(token)


def register() -> None:
    """Make our function known to transformers; may be repeated."""
    from transformers import AttentionInterface

    AttentionInterface.register(NAME, _attention)


def _attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    is_causal: bool | None = None,
    **others: Any,
) -> tuple[torch.Tensor, None]:
    """Serve transformers' interface: ``[1, heads, tokens, dim]`` in, ``[1, tokens, ...]`` out."""
    layer = getattr(module, "layer_idx", None)
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    bias = others.get("position_bias")
    if layer is None or not causal or attention_mask is not None or bias is not None:
        raise KVEvalError(
            f"{type(module).__name__} has attention that is not plain causal self-attention "
            "(no layer index, not causal, a mask or a position bias of its own). Only decoder "
            "models can be calibrated and evaluated."
        )
    call = LayerCall(
        layer,
        query[0].transpose(0, 1),
        key[0].transpose(0, 1),
        value[0].transpose(0, 1),
        query.shape[-1] ** -0.5 if scaling is None else float(scaling),
        sliding_window or 0,
        softcap or 0.0,
        None if s_aux is None else s_aux.detach().float().contiguous(),
    )
    return _hook.get()(call)[None], None
