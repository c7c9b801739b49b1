"""Launches the AscendC kernel of attention at a shape, apart from any engine.

It is launched as the plugin launches it (:mod:`ascend_plugin.ops.npu.ascendc`), on the device's own
number of cores. Values do not matter to what it moves: pages, scales and queries are zeros, and no
token has a patch (the slots are read all the same).
"""

from __future__ import annotations

import statistics
from typing import TYPE_CHECKING, Any

from ascend_plugin.bench.npu_cost.messages import KernelShape, Launched
from ascend_plugin.bench.npu_cost.trace import trace_size

if TYPE_CHECKING:
    from ascend_plugin.kv_cache import PageFormat

#: On hardware: launches that are timed, after one that is not.
_TIMED_LAUNCHES = 32


def launch(shape: KernelShape, trace: str) -> Launched:
    """Launch the kernel once; on hardware many times.

    Args:
        shape: of the launch.
        trace: the file that the simulator appends launches to; empty on hardware.

    Raises:
        RuntimeError: the kernel is missing, or does not take the shape.
    """
    from ascend_plugin.ops.npu.device import npu

    page = page_format(shape)
    call = _bind(shape, page)
    npu.synchronize()
    begin = trace_size(trace)
    call()
    npu.synchronize()
    return Launched(
        place=(begin, trace_size(trace)),
        pages_bytes=shape.batch * shape.context * page.page_bytes / page.block_size,
        us=None if trace else _time(call),
    )


def page_format(shape: KernelShape) -> PageFormat:
    """Return the format of a variant's pages on an NPU."""
    import torch

    from ascend_plugin.kv_cache import PageFormat
    from ascend_plugin.kv_cache.variants import QUANTISATIONS
    from ascend_plugin.ops.page_layout import Arrangement, PatchCode

    size = (shape.block_size, shape.kv_heads, shape.head_dim)
    quantisation = QUANTISATIONS[shape.variant]
    return PageFormat(torch.int8, *size, quantisation, PatchCode.INT4, Arrangement.PLANE_MAJOR)


def _bind(shape: KernelShape, page: PageFormat) -> Any:
    """Return the launch, without arguments."""
    import functools

    import torch

    from ascend_plugin.ops.npu import ascendc
    from ascend_plugin.ops.npu.planes import page_planes

    _check(shape, page)
    device = torch.device("npu", 0)
    layout = page.plane_layout()
    blocks = -(-shape.context // shape.block_size)
    pages = torch.zeros(
        page.pages_shape(shape.batch * blocks), dtype=page.dtype, device=device
    )  # every sequence has its own, so that a chip's cache holds no common ones
    table = torch.arange(shape.batch * blocks, dtype=torch.int32).view(shape.batch, blocks)
    starts = torch.arange(shape.batch + 1, dtype=torch.int32) * shape.query_tokens
    lengths = torch.full((shape.batch,), shape.context, dtype=torch.int32)
    batch = ascendc.DeviceBatch(
        table.to(device), starts.to(device), lengths.to(device), shape.query_tokens
    )
    rows = (shape.batch * shape.query_tokens, shape.heads, shape.head_dim)
    query = torch.zeros(rows, dtype=torch.bfloat16, device=device)
    channels = torch.ones(2, shape.kv_heads, shape.head_dim, device=device)
    layer = ascendc.Int8Layer(
        page.quantisation, channels if page.quantisation.static else None, page.patch_code
    )
    return functools.partial(
        ascendc.attend,
        query,
        page_planes(pages, layout),
        batch,
        layer,
        torch.empty_like(query),
        shape.head_dim**-0.5,
    )


def _check(shape: KernelShape, page: PageFormat) -> None:
    import torch

    from ascend_plugin.ops.npu import ascendc

    found = ascendc.support(
        "paged_attention", page.quantisation, torch.bfloat16, shape.head_dim, shape.block_size
    )
    if not found.ok:
        raise RuntimeError(f"attention over {shape.variant} pages: {found.reason}")
    rows = shape.heads // shape.kv_heads * shape.query_tokens
    if rows > ascendc.MAX_ROWS:
        raise RuntimeError(
            f"{shape.query_tokens} query tokens of {shape.heads // shape.kv_heads} heads are "
            f"{rows} rows of a kv head; the kernel takes {ascendc.MAX_ROWS}: use fewer --drafts."
        )


def _time(call: Any) -> float:
    """Return the median microseconds of a launch, by events on the stream."""
    from ascend_plugin.ops.npu.device import npu

    pairs = []
    for _ in range(_TIMED_LAUNCHES):
        pair = [npu.Event(enable_timing=True) for _ in range(2)]
        pair[0].record()
        call()
        pair[1].record()
        pairs.append(pair)
    npu.synchronize()
    return statistics.median(1000 * float(start.elapsed_time(end)) for start, end in pairs)
