"""One call of the fused infer attention operator: its arguments by name, its tensors by request.

The versions V2, V3 and V4 of ``aclnnFusedInferAttentionScore`` differ by the arguments that were
added. ``Q_S`` and ``KV_S`` are the documentation's names of the token dimensions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

_TENSORS = [
    "query",
    "keys",
    "values",
    "pse_shift",
    "atten_mask",
    "actual_seq_lengths",
    "actual_seq_lengths_kv",
    "dequant_scale1",
    "quant_scale1",
    "dequant_scale2",
    "quant_scale2",
    "quant_offset2",
    "antiquant_scale",
    "antiquant_offset",
    "block_table",
    "query_padding_size",
    "kv_padding_size",
    "key_antiquant_scale",
    "key_antiquant_offset",
    "value_antiquant_scale",
    "value_antiquant_offset",
    "key_shared_prefix",
    "value_shared_prefix",
    "actual_shared_prefix_len",
]
_ROPE = ["query_rope", "key_rope", "key_rope_antiquant_scale"]
_V4 = ["dequant_scale_query", "learnable_sink"]
_ATTRIBUTES = [
    "num_heads",
    "scale",
    "pre_tokens",
    "next_tokens",
    "input_layout",
    "num_key_value_heads",
    "sparse_mode",
    "inner_precise",
    "block_size",
    "antiquant_mode",
    "softmax_lse_flag",
    "key_antiquant_mode",
    "value_antiquant_mode",
]
_OUTPUTS = ["attention_out", "softmax_lse"]

_TENSOR_LETTERS = "TLLTTAATTTTTTTTTTTTTTTTA"
_ATTRIBUTE_LETTERS = "idiiciiiiibii"

#: Letters and names of the arguments of each version.
SIGNATURES = {
    2: _TENSOR_LETTERS + _ATTRIBUTE_LETTERS + "TT",
    3: _TENSOR_LETTERS + "TTT" + _ATTRIBUTE_LETTERS + "TT",
    4: _TENSOR_LETTERS + "TTTTT" + _ATTRIBUTE_LETTERS + "iTT",
}
_NAMES = {
    2: [*_TENSORS, *_ATTRIBUTES, *_OUTPUTS],
    3: [*_TENSORS, *_ROPE, *_ATTRIBUTES, *_OUTPUTS],
    4: [*_TENSORS, *_ROPE, *_V4, *_ATTRIBUTES, "query_quant_mode", *_OUTPUTS],
}

_AS_GIVEN = ("scale", "pre_tokens", "next_tokens", "sparse_mode", "inner_precise", "block_size")

#: Arguments of features that the simulator does not have.
UNSIMULATED = [
    "pse_shift",
    "dequant_scale1",
    "quant_scale1",
    "dequant_scale2",
    "quant_scale2",
    "quant_offset2",
    "antiquant_scale",
    "antiquant_offset",
    "query_padding_size",
    "kv_padding_size",
    "key_antiquant_offset",
    "value_antiquant_offset",
    "key_shared_prefix",
    "value_shared_prefix",
    "key_rope_antiquant_scale",
    "dequant_scale_query",
]


@dataclass(frozen=True, slots=True)
class AttentionCall:
    """Arguments by name; absent ones are None.

    Attributes:
        query: in ``layout``.
        key: ``[blocks, block, H]``, ``[blocks, N, block, D]`` or
            ``[blocks, N, D / C0, block, C0]`` if paged, else in ``layout``.
        value: as ``key``.
        mask: nonzero where a key is masked.
        q_lengths: cumulated where the layout has a T dimension, else per request, or None.
        kv_lengths: per request if paged; otherwise as ``q_lengths``.
        block_table: int32 ``[requests, blocks per request]``; None: not paged.
        layout: of the input; ``out_layout`` of the output.
        unsimulated: names of given arguments that the simulator does not know.
    """

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    mask: torch.Tensor | None
    q_lengths: list[int] | None
    kv_lengths: list[int] | None
    block_table: torch.Tensor | None
    key_scale: torch.Tensor | None
    value_scale: torch.Tensor | None
    query_rope: torch.Tensor | None
    key_rope: torch.Tensor | None
    sink: torch.Tensor | None
    heads: int
    kv_heads: int
    scale: float
    pre_tokens: int
    next_tokens: int
    layout: str
    out_layout: str
    sparse_mode: int
    inner_precise: int
    block_size: int
    key_mode: int
    value_mode: int
    wants_lse: bool
    out: torch.Tensor
    lse: torch.Tensor
    unsimulated: tuple[str, ...]

    @classmethod
    def of(cls, version: int, args: Sequence[Any]) -> AttentionCall:
        """Name the arguments of one version of the operator."""
        given = dict(zip(_NAMES[version], args, strict=True))
        unsimulated = tuple(name for name in UNSIMULATED if _optional(given.get(name)) is not None)
        if len(given["keys"]) != 1 or len(given["values"]) != 1:
            unsimulated += ("key and value as lists of several tensors",)
        layout, _, out_layout = given["input_layout"].decode().partition("_")
        return cls(
            query=given["query"],
            key=given["keys"][0],
            value=given["values"][0],
            mask=_optional(given["atten_mask"]),
            q_lengths=given["actual_seq_lengths"] or None,
            kv_lengths=given["actual_seq_lengths_kv"] or None,
            block_table=_optional(given["block_table"]),
            key_scale=_optional(given["key_antiquant_scale"]),
            value_scale=_optional(given["value_antiquant_scale"]),
            query_rope=_optional(given.get("query_rope")),
            key_rope=_optional(given.get("key_rope")),
            sink=_optional(given.get("learnable_sink")),
            heads=given["num_heads"],
            kv_heads=given["num_key_value_heads"] or given["num_heads"],
            layout=layout,
            out_layout=out_layout or layout,
            key_mode=given["key_antiquant_mode"],
            value_mode=given["value_antiquant_mode"],
            wants_lse=given["softmax_lse_flag"],
            out=given["attention_out"],
            lse=given["softmax_lse"],
            unsimulated=unsimulated,
            **{name: given[name] for name in _AS_GIVEN},
        )

    @property
    def paged(self) -> bool:
        """Whether keys and values lie in pages."""
        return self.block_table is not None

    @property
    def flat(self) -> bool:
        """Whether the tokens of all requests lie in one T dimension."""
        return "T" in self.layout

    @property
    def requests(self) -> int:
        """How many requests the batch has."""
        if self.flat:
            return len(self.q_lengths or ())
        return int(self.query.shape[0])

    @property
    def max_query(self) -> int:
        """Q_S: tokens per request; the longest one in a layout with T."""
        if self.flat:
            return max(lengths(self.q_lengths or [0], cumulated=True))
        return int(self.query.shape[2 if self.layout == "BNSD" else 1])

    @property
    def page_format(self) -> str:
        """How pages are arranged: by the number of dimensions."""
        return {3: "BnBsH", 4: "BnNBsD", 5: "NZ"}.get(self.key.dim(), "unknown")

    def query_width(self, query: torch.Tensor) -> int:
        """Return the head dimension of the query, or of its rope."""
        width = int(query.shape[-1])
        return width // self.heads if self.layout == "BSH" else width

    def key_width(self, keys: torch.Tensor) -> int:
        """Return the head dimension of keys or values, or of the keys' rope."""
        if self.paged and keys.dim() == 5:
            return int(keys.shape[2] * keys.shape[4])
        joined = keys.dim() == 3 if self.paged else self.layout == "BSH"
        width = int(keys.shape[-1])
        return width // self.kv_heads if joined else width

    def query_lengths(self) -> list[int]:
        """Return Q_S of each request."""
        if self.flat:
            return lengths(self.q_lengths or [], cumulated=True)
        return _shared(self.q_lengths or [self.max_query], self.requests)

    def key_lengths(self) -> list[int]:
        """Return KV_S of each request."""
        if self.flat and not self.paged:
            return lengths(self.kv_lengths or [], cumulated=True)
        if self.kv_lengths is not None:
            return _shared(self.kv_lengths, self.requests)
        dim = 2 if self.layout == "BNSD" else 1
        return [int(self.key.shape[dim])] * self.requests


def split(tensor: torch.Tensor, layout: str, heads: int, counts: list[int]) -> list[torch.Tensor]:
    """Return views ``[heads, tokens, head_dim]``, one per request, into a tensor."""
    if layout in ("TND", "NTD"):
        by_head = tensor.transpose(0, 1) if layout == "TND" else tensor  # [N, T, D]
        starts = [sum(counts[:index]) for index in range(len(counts))]
        return [by_head[:, at : at + n] for at, n in zip(starts, counts, strict=True)]
    if layout == "BSH":
        tensor = tensor.unflatten(-1, (heads, -1))  # [B, S, N, D]
    order = {"BSH": (0, 2, 1, 3), "BSND": (0, 2, 1, 3), "BNSD": (0, 1, 2, 3), "NBSD": (1, 0, 2, 3)}
    if layout not in order:
        raise NotImplementedError(f"layout {layout} is not simulated")
    by_request = tensor.permute(order[layout])  # [B, N, S, D]
    return [by_request[index, :, :n] for index, n in enumerate(counts)]


def lengths(values: list[int], *, cumulated: bool) -> list[int]:
    """Return the lengths of requests."""
    if not cumulated:
        return values
    return [b - a for a, b in zip([0, *values], values, strict=False)]


def _shared(values: list[int], requests: int) -> list[int]:
    """One value serves all requests; otherwise the first ones count."""
    return values * requests if len(values) == 1 else values[:requests]


def _optional(value: torch.Tensor | None) -> torch.Tensor | None:
    return value if value is not None and value.numel() else None
