"""Rows about the AscendC kernel of attention at a shape. No import of torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ascend_plugin.bench.npu_cost import trace
from ascend_plugin.bench.npu_cost.chip import Chip, estimate
from ascend_plugin.bench.npu_cost.messages import KernelShape, Launched
from ascend_plugin.bench.npu_cost.models import Geometry
from ascend_plugin.bench.npu_cost.rows import KernelRow
from ascend_plugin.bench.npu_cost.settings import DECODE
from ascend_plugin.bench.npu_cost.trace import Work

VERIFICATION = "verification"

#: Arguments of the kernel that make up the pages: codes, then scales or patches.
_PAGES = ("pages", "extras")


def kernel_row(
    geometry: Geometry,
    context: int,
    shapes: Sequence[KernelShape],
    launched: Sequence[Launched],
    path: Path | None,
    chip: Chip,
) -> KernelRow:
    """Return the row of a launch.

    Args:
        geometry: of the model.
        context: the asked one.
        shapes: what was launched: at that context, or at two others whose line tells it.
        launched: the answers.
        path: the trace; None on hardware.
        chip: of the roofline.
    """
    contexts = [shape.context for shape in shapes]
    shape = shapes[-1]
    pages_bytes = round(_line(contexts, [each.pages_bytes for each in launched], context))
    told = {} if path is None else _told(path, contexts, launched, context)
    flops = geometry.attention_flops(shape.batch, context) * shape.query_tokens
    roof = estimate([Work(1, told.get("memory", pages_bytes), flops)], chip)
    read, cycles = told.get("pages_read"), told.get("cycles")
    times = [each.us for each in launched if each.us is not None]
    return KernelRow(
        model=geometry.name,
        phase=DECODE if shape.query_tokens == 1 else VERIFICATION,
        variant=shape.variant,
        batch=shape.batch,
        query_tokens=shape.query_tokens,
        context=context,
        cores=told.get("cores"),
        cycles=cycles,
        estimated_us=None if cycles is None else round(cycles / told["clock_ghz"] / 1e3, 1),
        bound=told.get("bound"),
        busiest=told.get("busiest"),
        busiest_cycles=told.get("busiest_cycles"),
        memory_cycles=told.get("memory_cycles"),
        bytes=told.get("memory"),
        pages_bytes=pages_bytes,
        pages_read=read,
        pages_read_ratio=None if read is None else round(read / pages_bytes, 4),
        workspace_bytes=told.get("workspace"),
        roofline_us=round(roof.us, 1),
        roofline_bound=roof.bound,
        measured_us=round(_line(contexts, times, context), 1) if times else None,
        note=None if len(contexts) == 1 else f"told from contexts {contexts[0]} and {contexts[1]}",
    )


def _told(
    path: Path, contexts: Sequence[int], launched: Sequence[Launched], context: int
) -> dict[str, Any]:
    """Return what the trace says of the launch, and of two at the context between or beyond."""
    lines = [_launch(path, each) for each in launched]
    told = dict(lines[-1])
    for name, value in told.items():
        if isinstance(value, int):
            told[name] = round(_line(contexts, [line[name] for line in lines], context))
    return told


def _launch(path: Path, launched: Launched) -> dict[str, Any]:
    (line,) = trace.read_launches(path, *launched.place)
    reads: Mapping[str, int] = line["reads"]
    return {
        **{name: line[name] for name in _COPIED},
        "pages_read": sum(reads.get(name, 0) for name in _PAGES),
        "memory": line["bytes"] - line["workspace"],
    }


_COPIED = (
    *("cycles", "memory_cycles", "busiest_cycles", "busiest", "bound"),
    *("workspace", "clock_ghz", "cores"),
)


def _line(contexts: Sequence[int], values: Sequence[float], context: int) -> float:
    """Return the value at a context: on the line through two, or the only one."""
    if len(contexts) == 1:
        return values[0]
    share = (context - contexts[0]) / (contexts[1] - contexts[0])
    return values[0] + (values[1] - values[0]) * share
