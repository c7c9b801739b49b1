"""Attention over planes through the fused infer attention operator (FIA), and who serves what.

The choice, best first: FIA where it reads the pages (those of c8d only without kernels: it wants
their scales gathered); the AscendC kernel for decoding and verifying over int8 pages; for other
batches over them, a kernel that copies their context out, dequantised, and FIA over that; without
kernels the same copy by operators of torch_npu (``gather.py``).

Source of the constraints: the documentation of ``torch_npu.npu_fused_infer_attention_score`` and
the tiling checks of the operator's public sources.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch_npu

from .. import quantise
from ..dispatch import Implementation, Operator, Support
from ..page_layout import Quantisation
from . import ascendc
from .ascendc import DeviceBatch, Int8Layer
from .hadamard import rotate
from .memory import weak_reference
from .planes import Planes
from .write import DTYPES, ChannelScales

#: Names of the implementations, beside :data:`ascendc.NAME`.
FUSED, KERNEL_GATHER, GATHER = "npu", "ascendc-gather", "npu-gather"

#: Head dimensions for which the operator reads NZ pages of 16-bit elements.
NZ_HEAD_DIMS = (64, 128)

#: Query heads that may share a kv head.
MAX_GROUP = 64

#: What the operator says of int8 pages in NZ order.
INT8_HEADS = ((10, 1), (64, 8), (80, 8), (128, 16))
INT8_BLOCKS = (128, 512)
INT8_HEAD_DIM = 128
INT8_MAX_TOKENS = 16

#: ``key_antiquant_mode``: one scale per channel; one per token. With int8 pages in NZ order the
#: operator knows no other (``CheckKVAntiQuantMode`` of its tiling: "0 or 1 in GQA KV NZ").
_PER_CHANNEL, _PER_TOKEN = 0, 1

#: ``sparse_mode``: no mask; causal from the lower right corner; a band of it.
_NO_MASK, _CAUSAL, _BAND = 0, 3, 4

_UNBOUNDED = 2**31 - 1


@dataclass(frozen=True, slots=True)
class FusedRequest:
    """What the support query must know of a call.

    Attributes:
        dtype: of the query.
        quantisation: of the pages.
        num_heads: query heads.
        num_kv_heads: kv heads.
        head_dim: elements of a head.
        block_size: tokens in a block.
        uniform: query tokens of every sequence up to 16; 0: sequences differ, or have more.
        max_query: the most query tokens of a sequence up to 16; 0: there are more.
        window: whether a row sees the latest tokens alone.
        soft_cap: whether scores are bounded.
        alibi: whether scores fall with the distance.
        sinks: whether heads have attention sinks.
    """

    dtype: torch.dtype
    quantisation: Quantisation
    num_heads: int
    num_kv_heads: int
    head_dim: int
    block_size: int
    uniform: int = 0
    max_query: int = 0
    window: bool = False
    soft_cap: bool = False
    alibi: bool = False
    sinks: bool = False


def common_reasons(request: FusedRequest) -> str:
    """Return why no path on the NPU serves a whole model; empty: nothing speaks against it."""
    head_dim = (
        request.head_dim not in NZ_HEAD_DIMS,
        f"head dimension {request.head_dim}; NZ pages are read for 64 and 128",
    )
    return "; ".join(reason for wrong, reason in [*_score_reasons(request), head_dim] if wrong)


def _score_reasons(request: FusedRequest) -> list[tuple[bool, str]]:
    """Return conditions under which neither FIA nor a kernel computes the scores."""
    return [
        (request.dtype not in DTYPES, f"{request.dtype} queries; allowed are bf16 and fp16"),
        (
            request.num_heads % request.num_kv_heads != 0
            or request.num_heads // request.num_kv_heads > MAX_GROUP,
            f"{request.num_heads} query heads over {request.num_kv_heads} kv heads; a kv head "
            f"serves a whole number of them up to {MAX_GROUP}",
        ),
        (request.soft_cap, "a soft cap, which the fused operator does not have"),
        (request.alibi, "ALiBi, for which the fused operator wants a bias per query and token"),
        (request.sinks, "attention sinks, which npu_fused_infer_attention_score does not have"),
    ]


def fused_support(request: FusedRequest) -> Support:
    """Say whether the fused operator reads the pages themselves, and why."""
    common = common_reasons(request)
    if common:
        return Support(False, common)
    if request.quantisation is Quantisation.NONE:
        return Support(True, "the fused operator reads NZ pages")
    if request.quantisation is Quantisation.C8P:
        return Support(False, "patches (c8p), which no operator of torch_npu reads")
    heads = (request.num_heads, request.num_kv_heads)
    reasons = [
        (request.dtype != torch.bfloat16, f"{request.dtype} queries; int8 pages need bfloat16"),
        (request.head_dim != INT8_HEAD_DIM, f"head dimension {request.head_dim}, not 128"),
        (heads not in INT8_HEADS, f"heads {heads}; the operator lists {INT8_HEADS}"),
        (
            request.block_size not in INT8_BLOCKS,
            f"blocks of {request.block_size}; int8 pages are read in blocks of {INT8_BLOCKS}",
        ),
        (
            not 1 <= request.uniform <= INT8_MAX_TOKENS,
            f"not 1 to {INT8_MAX_TOKENS} query tokens in every sequence",
        ),
        (request.window, "a sliding window, which int8 pages exclude"),
        (
            request.quantisation is Quantisation.C8D and request.num_kv_heads != 1,
            f"c8d scales of {request.num_kv_heads} kv heads; for NZ pages the operator takes one "
            "scale per token",
        ),
    ]
    why_not = "; ".join(reason for wrong, reason in reasons if wrong)
    if why_not:
        return Support(False, why_not)
    if request.quantisation is Quantisation.C8D and kernel_support(request).ok:
        return Support(
            False, "c8d scales, which must be gathered for it; the AscendC kernel reads them itself"
        )
    return Support(True, "the fused operator dequantises NZ pages as it reads them")


def kernel_support(request: FusedRequest) -> Support:
    """Say whether the AscendC kernel reads the pages themselves, and why."""
    if request.quantisation is Quantisation.NONE:
        return Support(False, "pages without quantisation, which the fused operator reads")
    rows = request.max_query * (request.num_heads // request.num_kv_heads)
    reasons = [
        *_score_reasons(request),
        (
            not 1 <= request.max_query <= ascendc.MAX_QUERY,
            f"more than {ascendc.MAX_QUERY} query tokens in a sequence",
        ),
        (
            rows > ascendc.MAX_ROWS,
            f"{rows} rows of a kv head (query tokens times heads that share it); the kernel holds "
            f"{ascendc.MAX_ROWS}",
        ),
    ]
    why_not = "; ".join(reason for wrong, reason in reasons if wrong)
    return Support(False, why_not) if why_not else _kernel("paged_attention", request)


def kernel_gather_support(request: FusedRequest) -> Support:
    """Say whether an AscendC kernel dequantises pages for the fused operator, and why."""
    common = common_reasons(request)
    if common:
        return Support(False, common)
    if request.quantisation is Quantisation.NONE:
        return Support(False, "pages without quantisation need no dequantisation")
    return _kernel("kv_cache_gather", request)


def _kernel(name: str, request: FusedRequest) -> Support:
    return ascendc.support(
        name, request.quantisation, request.dtype, request.head_dim, request.block_size
    )


def gather_support(request: FusedRequest) -> Support:
    """Say whether pages can be dequantised first, and why."""
    common = common_reasons(request)
    if common:
        return Support(False, common)
    if request.quantisation is Quantisation.NONE:
        return Support(False, "pages without quantisation need no dequantisation")
    if request.quantisation is Quantisation.C8P:
        return Support(False, "patches (c8p), which no operator of torch_npu reads")
    return Support(True, "pages are gathered and dequantised, then attended to without pages")


operator: Operator[FusedRequest] = Operator(
    "paged_attention (npu)",
    (
        Implementation(FUSED, fused_support),
        Implementation(ascendc.NAME, kernel_support),
        Implementation(KERNEL_GATHER, kernel_gather_support),
        Implementation(GATHER, gather_support),
    ),
)


@dataclass(frozen=True)
class Batch:
    """One batch as the fused operator takes it. Lengths are numbers on the host.

    Attributes:
        query_ends: tokens of the batch up to the end of each sequence.
        seq_lens: tokens of context of each sequence; 0: its rows are padding and become zero.
        blocks: int32 ``[sequences, max_blocks]``, indices of planes.
        uniform: query tokens of every sequence; 0: they differ.
        causal: whether a token sees only itself and earlier ones.
        device: the same for kernels, which read lengths on the device.
    """

    query_ends: list[int]
    seq_lens: list[int]
    blocks: torch.Tensor
    uniform: int
    causal: bool = True
    device: DeviceBatch | None = None

    @property
    def max_query(self) -> int:
        """The most query tokens of a sequence up to 16; 0: there are more."""
        most = 0 if self.device is None else self.device.max_query
        return most if most <= ascendc.MAX_QUERY else 0

    @functools.cached_property
    def starts(self) -> torch.Tensor:
        """The tokens of context before each sequence, int32 ``[sequences]`` on the device.

        The numbers are made on the host, where lengths are known, and copied without waiting.
        """
        before = [0, *itertools.accumulate(self.seq_lens)][:-1]
        host = torch.tensor(before, dtype=torch.int32).pin_memory()
        return host.to(self.blocks.device, non_blocking=True)


def uniform_rows(rows: Sequence[int]) -> int:
    """Return how many query tokens every sequence has, up to 16; 0: they differ, or are more."""
    found = set(rows)
    each = found.pop() if len(found) == 1 else 0
    return each if each <= ascendc.MAX_QUERY else 0


@functools.cache
def mask(device: torch.device) -> torch.Tensor:
    """Return the compressed mask, int8 ``[2048, 2048]``, 1 where a token must not look."""
    return torch.ones(2048, 2048, dtype=torch.int8).triu_(1).to(device)


def prepare(device: torch.device, head_dim: int, dtype: torch.dtype) -> None:
    """Make the constants of attention: while a graph is captured nothing can be copied to a device.

    Args:
        device: where attention will run.
        head_dim: elements of a head.
        dtype: of the queries.
    """
    mask(device)
    rotate(torch.zeros((1, head_dim), dtype=dtype, device=device))


@dataclass(frozen=True, slots=True)
class Head:
    """A layer's constants.

    Attributes:
        num_heads: query heads.
        scale: factor of the scores.
        window: how many tokens a row sees, itself included; 0: all.
        quantisation: of the pages.
        scales: C8S: the layer's.
        layer: what kernels must know of int8 pages.
    """

    num_heads: int
    scale: float
    window: int = 0
    quantisation: Quantisation = Quantisation.NONE
    scales: ChannelScales | None = None
    layer: Int8Layer = field(default_factory=Int8Layer)

    def scale_of(self, head_dim: int) -> float:
        """Return the factor of the products, which the rotation of C8D pages has made larger."""
        if self.quantisation is not Quantisation.C8D:
            return self.scale
        return self.scale / quantise.rotated_channels(head_dim)


@dataclass(slots=True)
class FusedCall:
    """A call of the fused operator that can be made again with other lengths.

    Attributes:
        inputs: query, key and value.
        options: everything else but the lengths.
        uniform: as in the batch, if the query has a dimension for sequences.
        released: names of options that belong to the step, like the query.
    """

    inputs: tuple[torch.Tensor, torch.Tensor, torch.Tensor]
    options: dict[str, Any]
    uniform: int = 0
    released: tuple[str, ...] = ()
    _out: list[torch.Tensor] = field(default_factory=list)

    def run(self, batch: Batch, out: torch.Tensor) -> None:
        """Attend and write into ``out``, ``[tokens, heads, head_dim]``."""
        found, _ = torch_npu.npu_fused_infer_attention_score(
            *self.inputs, **self.options, **self._lengths(batch)
        )
        out.copy_(found.view(out.shape))

    def reserve(
        self,
        batch: Batch,
        out: torch.Tensor,
        room: Callable[[torch.Tensor], torch.Tensor] = lambda workspace: workspace,
    ) -> None:
        """Fix the memory of workspace and result, so that :meth:`launch` allocates nothing.

        Args:
            batch: of the shape that all later ones will have.
            out: ``[tokens, heads, head_dim]``, contiguous, where results go.
            room: returns workspace to use instead of new one of at most its size.
        """
        found = torch_npu._npu_fused_infer_attention_score_get_max_workspace(
            *self.inputs, **self.options, **self._lengths(batch)
        )
        lse = torch.empty(1, dtype=torch.float32, device=out.device)
        self._out = [out.view(self.inputs[0].shape), lse]
        self.options["workspace"] = room(found)

    def release(self) -> None:
        """Keep no memory but the workspace: what was captured lies in the pool of its graph.

        Kernels of a graph follow each other, so the query and the result of a layer may lie where
        those of another do. Held here, they would take their place for every layer and graph.
        """
        query, key, value = self.inputs
        self.inputs = (weak_reference(query), key, value)
        self._out = [weak_reference(each) for each in self._out]
        for name in self.released:
            self.options[name] = weak_reference(self.options[name])

    def launch(self, batch: Batch) -> None:
        """Attend as :meth:`run` does, into reserved memory: one launch and no allocation."""
        torch_npu.npu_fused_infer_attention_score.out(
            *self.inputs, **self.options, **self._lengths(batch), out=self._out
        )

    def _lengths(self, batch: Batch) -> dict[str, Sequence[int]]:
        if not self.uniform:
            return {
                "actual_seq_lengths": batch.query_ends,
                "actual_seq_lengths_kv": batch.seq_lens,
            }
        return {"actual_seq_lengths_kv": batch.seq_lens}


def fused_call(query: torch.Tensor, planes: Planes, batch: Batch, head: Head) -> FusedCall:
    """Return the call over pages without quantisation, or int8 ones that the operator can read.

    Args:
        query: ``[tokens, heads, head_dim]``; not contiguous: it is copied.
        planes: of the layer's pages.
        batch: lengths and blocks.
        head: the layer's constants.
    """
    _, kv_heads, _, block_size, _ = planes.key.shape
    query = query.contiguous()
    options: dict[str, Any] = {
        "block_table": batch.blocks,
        "block_size": block_size,
        "num_heads": head.num_heads,
        "num_key_value_heads": kv_heads,
        "scale": head.scale_of(query.shape[-1]),
    }
    options |= masking(query.device, batch.causal, head.window)
    if head.quantisation is Quantisation.NONE:
        options["input_layout"] = "TND"
        return FusedCall((query, planes.key, planes.value), options)
    shape = (len(batch.seq_lens), batch.uniform, head.num_heads, query.shape[-1])
    options |= {"input_layout": "BSND", "inner_precise": 1}
    if batch.uniform == 1:
        options["sparse_mode"] = _NO_MASK
        del options["atten_mask"]
    options |= _antiquant(planes, batch, head)
    return FusedCall((query.view(shape), planes.key, planes.value), options, batch.uniform)


def token_scales(planes: Planes, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
    """Return C8D's scales in the order of each sequence's tokens, of one kv head.

    Returns:
        K's and V's, float32 ``[sequences, max_blocks * block_size]``.
    """
    assert planes.key_scales is not None
    assert planes.value_scales is not None
    blocks = batch.blocks.flatten()
    sequences = batch.blocks.shape[0]
    key, value = (
        scales.flatten(1).index_select(0, blocks).view(sequences, -1)
        for scales in (planes.key_scales, planes.value_scales)
    )
    return key, value


def attend(
    query: torch.Tensor, planes: Planes, batch: Batch, head: Head, out: torch.Tensor
) -> None:
    """Attend ``query [tokens, heads, head_dim]`` to pages that the operator reads, into ``out``."""
    if head.quantisation is Quantisation.C8D:
        query = rotate(query)
    fused_call(query, planes, batch, head).run(batch, out)


def masking(device: torch.device, causal: bool, window: int) -> dict[str, Any]:
    """Return the operator's options for what a token may see."""
    if not causal and not window:
        return {"sparse_mode": _NO_MASK}
    if not window:
        return {"sparse_mode": _CAUSAL, "atten_mask": mask(device)}
    return {
        "sparse_mode": _BAND,
        "atten_mask": mask(device),
        "pre_tokens": window - 1,
        "next_tokens": 0 if causal else window - 1,
    }


def _antiquant(planes: Planes, batch: Batch, head: Head) -> dict[str, Any]:
    """Return the operator's options for what int8 codes are worth."""
    if head.quantisation is Quantisation.C8S:
        assert head.scales is not None
        # [kv_heads, head_dim]: what the operator wants with input layout BSND
        key, value = head.scales.key.squeeze(1), head.scales.value.squeeze(1)
        mode = _PER_CHANNEL
    else:
        key, value = token_scales(planes, batch)
        mode = _PER_TOKEN
    return {
        "key_antiquant_scale": key,
        "value_antiquant_scale": value,
        "key_antiquant_mode": mode,
        "value_antiquant_mode": mode,
    }
