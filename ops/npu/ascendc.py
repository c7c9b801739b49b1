"""The AscendC kernels over planes: what they accept, and how they are launched.

Every launch is one task of the current stream. Lengths, block tables and slots are read on the
device, so nothing here knows numbers of the batch beyond its shapes, and a captured launch follows
whatever lies in memory when it is replayed. Kernels and their arithmetic: ``ops/ascendc/kernels``.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from .. import checks
from ..ascendc import library
from ..dispatch import Support
from ..page_layout import PatchCode, Quantisation
from .device import npu
from .planes import Planes

#: The name of these implementations in the choices.
NAME = "ascendc"

#: The types of keys, values and queries, as entries are named.
DTYPES = {torch.bfloat16: "bf16", torch.float16: "fp16"}

#: Query tokens of a sequence that attention takes: 1 and drafts.
MAX_QUERY = 16

#: Rows that it holds of a kv head: query heads of the group times query tokens.
MAX_ROWS = 256

#: Head dimensions of int8 pages: whole fractals.
_INT8_MULTIPLE = 32


@dataclass(frozen=True, slots=True)
class Cores:
    """The cores of a device.

    Attributes:
        cube: units of a cube and two vector cores.
        vector: vector cores.
    """

    cube: int
    vector: int


@functools.cache
def cores_of(device: torch.device) -> Cores:
    """Return how many cores a device has.

    Raises:
        RuntimeError: it does not say.
    """
    told = npu.get_device_properties(device)
    cube, vector = (int(getattr(told, name, 0)) for name in ("cube_core_num", "vector_core_num"))
    if cube < 1 or vector < 1:
        raise RuntimeError(
            f"{device} reports {cube} cube and {vector} vector cores, so AscendC kernels cannot be "
            f"launched on it. Set {library.SWITCH}=0 to serve without them."
        )
    return Cores(cube, vector)


def check_cores(cores: int, available: int) -> None:
    """Refuse a number of cores that a launch cannot have.

    Raises:
        ValueError: none, or more than the device has: cores that wait for each other would wait for
            one that never starts.
    """
    if not 1 <= cores <= available:
        raise ValueError(
            f"a kernel cannot be launched on {cores} cores; this device has {available}. Leave "
            "the number out to use all of them."
        )


def entry(kernel: str, quantisation: Quantisation, dtype: torch.dtype) -> str:
    """Return the name of a kernel for pages and rows, such as ``kv_cache_write_c8d_bf16``."""
    return f"{kernel}_{quantisation.name.lower()}_{DTYPES.get(dtype, str(dtype))}"


def support(
    kernel: str, quantisation: Quantisation, dtype: torch.dtype, head_dim: int, block_size: int
) -> Support:
    """Say whether a kernel can be launched for pages and rows, and why not.

    Args:
        kernel: ``kv_cache_write``, ``kv_cache_gather`` or ``paged_attention``.
        quantisation: of the pages.
        dtype: of keys, values and queries.
        head_dim: elements of a head.
        block_size: tokens in a block.
    """
    multiple = checks.HEAD_DIM_MULTIPLE if quantisation is Quantisation.NONE else _INT8_MULTIPLE
    reasons = [
        (dtype not in DTYPES, f"{dtype} rows; the kernels take bf16 and fp16: set --dtype"),
        (
            not 0 < head_dim <= checks.MAX_HEAD_DIM or head_dim % multiple != 0,
            f"head dimension {head_dim}; the kernels take multiples of {multiple} up to "
            f"{checks.MAX_HEAD_DIM}",
        ),
        (
            not 0 < block_size <= checks.MAX_BLOCK_SIZE
            or block_size % checks.BLOCK_SIZE_MULTIPLE != 0,
            f"blocks of {block_size}; the kernels take multiples of {checks.BLOCK_SIZE_MULTIPLE} "
            f"up to {checks.MAX_BLOCK_SIZE}: change --block-size",
        ),
    ]
    why_not = "; ".join(reason for wrong, reason in reasons if wrong)
    if why_not:
        return Support(False, why_not)
    return library.support(entry(kernel, quantisation, dtype))


@dataclass(frozen=True, slots=True, eq=False)
class Int8Layer:
    """What the kernels must know of a layer's int8 pages.

    Attributes:
        quantisation: of the pages.
        channel_scales: C8S and C8P: float32 ``[2 (K, V), kv_heads, head_dim]``, on the device.
        patch_code: C8P: how residuals are coded.
        patch_thresholds: C8P: relative errors of K and of V from which on a row is patched.
        counters: int64 ``[vector cores, 4]`` on the device, added to, see ``ops.kv_cache_write``;
            each core has a row of its own. None: nothing is counted.
    """

    quantisation: Quantisation = Quantisation.NONE
    channel_scales: torch.Tensor | None = None
    patch_code: PatchCode = PatchCode.INT4
    patch_thresholds: tuple[float, ...] = (0.0, 0.0)
    counters: torch.Tensor | None = None


@dataclass(frozen=True)
class DeviceBatch:
    """The lengths of a batch, where kernels read them.

    Attributes:
        block_table: int32 ``[sequences, max_blocks]``, ids of blocks.
        query_start_loc: int32 ``[sequences + 1]``, rows before each sequence.
        seq_lens: int32 ``[sequences]``, tokens of context; 0: the sequence's rows become zero.
        max_query: no sequence has more query tokens than so many.
        causal: whether a token sees only itself and earlier ones.
    """

    block_table: torch.Tensor
    query_start_loc: torch.Tensor
    seq_lens: torch.Tensor
    max_query: int
    causal: bool = True


def write(
    key: torch.Tensor,
    value: torch.Tensor,
    planes: Planes,
    slot_mapping: torch.Tensor,
    layer: Int8Layer,
    cores: int | None = None,
) -> None:
    """Write tokens into planes, quantised or not: one launch.

    Args:
        key: ``[tokens, kv_heads, head_dim]``, bfloat16 or float16; a view of wider rows will do.
        value: the same shape and dtype.
        planes: of the layer's pages.
        slot_mapping: int64 ``[tokens]``, ``block * block_size + offset``; negative: not written.
        layer: of the pages.
        cores: vector cores to use; None: all.
    """
    tokens, kv_heads, head_dim = key.shape
    if tokens == 0:
        return
    available = cores_of(key.device).vector
    cores = available if cores is None else cores
    check_cores(cores, available)
    key, value = _token_rows(key), _token_rows(value)
    block_size = planes.key.shape[3]
    sizes = [tokens, kv_heads, head_dim, block_size, planes.num_blocks]
    torch.ops.ascend_plugin_launch.kv_cache_write(
        entry("kv_cache_write", layer.quantisation, key.dtype),
        cores,
        key,
        value,
        slot_mapping,
        planes.key,
        planes.extras,
        layer.channel_scales,
        None if layer.counters is None else layer.counters[:cores],
        [*sizes, key.stride(0), value.stride(0)],
        *layer.patch_thresholds,
        int(layer.patch_code),
    )


def gather(
    planes: Planes,
    batch: DeviceBatch,
    starts: torch.Tensor,
    layer: Int8Layer,
    out: tuple[torch.Tensor, torch.Tensor],
    cores: int | None = None,
) -> None:
    """Copy the context of every sequence out of int8 planes, dequantised: one launch.

    Args:
        planes: of the layer's pages.
        batch: lengths and blocks.
        starts: int32 ``[sequences]``, the first row of each sequence in ``out``.
        layer: of the pages.
        out: K and V, each ``[rows, kv_heads, head_dim]``, bfloat16 or float16, contiguous.
        cores: vector cores to use; None: all.
    """
    key, value = out
    sequences = batch.seq_lens.shape[0]
    if sequences == 0 or key.numel() == 0:
        return
    available = cores_of(key.device).vector
    cores = available if cores is None else cores
    check_cores(cores, available)
    _, kv_heads, head_dim = key.shape
    block_size = planes.key.shape[3]
    torch.ops.ascend_plugin_launch.kv_cache_gather(
        entry("kv_cache_gather", layer.quantisation, key.dtype),
        cores,
        planes.key,
        planes.extras,
        layer.channel_scales,
        batch.block_table,
        batch.seq_lens,
        starts,
        key,
        value,
        [sequences, kv_heads, head_dim, block_size, planes.num_blocks, batch.block_table.stride(0)],
        int(layer.patch_code),
    )


def attend(
    query: torch.Tensor,
    planes: Planes,
    batch: DeviceBatch,
    layer: Int8Layer,
    out: torch.Tensor,
    scale: float,
    window: int = 0,
    cores: int | None = None,
) -> None:
    """Attend to int8 planes, at most 16 query tokens per sequence: one launch.

    Args:
        query: ``[tokens, heads, head_dim]``, bfloat16 or float16.
        planes: of the layer's pages.
        batch: lengths and blocks.
        layer: of the pages.
        out: like ``query``.
        scale, window: as in the operator.
        cores: units of a cube and two vector cores to use; None: all that have work.
    """
    sequences, width = batch.block_table.shape
    if not sequences:
        return
    query = _token_rows(query)
    heads, head_dim = query.shape[1:]
    _, kv_heads, _, block_size, _ = planes.key.shape
    available = cores_of(query.device).cube
    if cores is None:  # work is cut by sequences, kv heads and pages
        cores = min(available, sequences * kv_heads * max(width, 1))
    check_cores(cores, available)
    shape = (heads, kv_heads, head_dim, block_size, batch.max_query, window, layer.quantisation)
    workspace = torch.empty(_workspace_bytes(shape, cores), dtype=torch.uint8, device=query.device)
    strides = [batch.block_table.stride(0), query.stride(0), out.stride(0)]
    torch.ops.ascend_plugin_launch.paged_attention(
        entry("paged_attention", layer.quantisation, query.dtype),
        cores,
        query,
        planes.key,
        planes.extras,
        layer.channel_scales,
        batch.block_table,
        batch.query_start_loc,
        batch.seq_lens,
        out,
        workspace,
        [sequences, *shape[:4], planes.num_blocks, *strides, batch.max_query],
        scale,
        [window, int(batch.causal), int(layer.patch_code)],
    )


@functools.cache
def _workspace_bytes(sizes: Sequence[int], cores: int) -> int:
    return int(torch.ops.ascend_plugin_launch.workspace_bytes([int(n) for n in sizes], cores))


def _token_rows(rows: torch.Tensor) -> torch.Tensor:
    """Return ``[tokens, heads, head_dim]`` with a token's heads side by side, copied if need be."""
    _, heads, head_dim = rows.shape
    if rows.stride(2) == 1 and (heads == 1 or rows.stride(1) == head_dim):
        return rows
    return rows.contiguous()
