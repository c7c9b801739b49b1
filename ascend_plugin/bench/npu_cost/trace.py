"""Launches of a step, read from the simulator's trace, and what one layer adds to them."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ascend_plugin.bench.errors import BenchError

#: Attention: the fused operator, in every version, and the AscendC kernels. The products that they
#: compute depend on lengths, so they are not in the trace.
KERNEL = "paged_attention_"
ATTENTION = ("aclnnFusedInferAttentionScore", KERNEL)

_ROTARY = "aclnnRopeWithSinCosCache"
_PRODUCTS = ("Matmul", "MatMul", "Mm", "Addmm", "Baddbmm", "Mv")
_ITEMSIZE = {"bfloat16": 2, "float16": 2, "float32": 4, "int8": 1}


@dataclass(frozen=True, slots=True)
class Work:
    """What launches of an operator do.

    Attributes:
        launches: how many.
        bytes: read and written.
        flops: of matrix products; 0 for the vector units' operators.
        cycles: AscendC kernels: what their host model estimates; 0 for the operators of CANN.
    """

    launches: int = 0
    bytes: float = 0
    flops: float = 0
    cycles: float = 0

    def __add__(self, other: Work) -> Work:
        """Return both together."""
        return Work(
            self.launches + other.launches,
            self.bytes + other.bytes,
            self.flops + other.flops,
            self.cycles + other.cycles,
        )

    def __sub__(self, other: Work) -> Work:
        """Return what this has more than the other."""
        return self + other.times(-1)

    def times(self, factor: float) -> Work:
        """Return so many times the work, with as many launches."""
        return Work(
            round(self.launches * factor),
            self.bytes * factor,
            self.flops * factor,
            self.cycles * factor,
        )


#: The work of a step, or of a layer, by operator.
Works = dict[str, Work]


def read_launches(path: Path, begin: int, end: int) -> list[dict[str, Any]]:
    """Return the launches between two places of a trace.

    Args:
        path: the trace.
        begin: bytes before the first line.
        end: bytes up to the last line's end.
    """
    with path.open("rb") as file:
        file.seek(begin)
        return [json.loads(line) for line in file.read(end - begin).splitlines()]


def read_step(path: Path, begin: int, end: int) -> Works:
    """Return the work between two places of a trace."""
    return add_up(read_launches(path, begin, end))


def kernel_bounds(path: Path, begin: int, end: int) -> dict[str, str]:
    """Return what bounds each AscendC kernel of a step, by the estimate of its host model."""
    launches = read_launches(path, begin, end)
    return {str(each["operator"]): str(each["bound"]) for each in launches if "bound" in each}


def trace_size(path: str) -> int:
    """Return the bytes of a trace; 0 if there is none."""
    return Path(path).stat().st_size if path and Path(path).exists() else 0


def add_up(launches: Iterable[Mapping[str, Any]]) -> Works:
    """Return the work of launches by operator, in the order in which operators first appear."""
    works: Works = {}
    for launch in launches:
        name = str(launch["operator"])
        work = Work(1, _bytes(launch), _flops(launch), launch.get("cycles", 0))
        works[name] = works.get(name, Work()) + work
    return works


def _bytes(launch: Mapping[str, Any]) -> int:
    """Return what a launch moves; of the table of cosines and sines, the rows that it reads.

    What a kernel keeps in a workspace does not count: it is as large as a corner of the L2 cache.
    """
    moved = int(launch["bytes"]) - int(launch.get("workspace", 0))
    if not str(launch["operator"]).startswith(_ROTARY):
        return moved
    positions, _, _, (table, dtype, _), *_ = launch["tensors"]
    unread = table[0] - min(table[0], math.prod(positions[0]))
    return moved - unread * table[1] * _ITEMSIZE[dtype]


def _flops(launch: Mapping[str, Any]) -> int:
    name = str(launch["operator"]).removeprefix("aclnn")
    if not any(product in name for product in _PRODUCTS):
        return 0
    *_, left, _, out = (shape for shape, _, _ in launch["tensors"])
    return 2 * math.prod(out) * int(left[-1])


def per_layer(shallow: Works, deep: Works, layers: int) -> Works:
    """Return the work of one layer: the difference of two models, shared by their layers.

    Args:
        shallow: a step of the model with fewer layers.
        deep: the same step of the other.
        layers: how many layers more it has.

    Raises:
        BenchError: the launches are no multiple of the layers, so layers differ.
    """
    found: Works = {}
    for name in {**deep, **shallow}:
        more, less = deep.get(name, Work()), shallow.get(name, Work())
        launches = more.launches - less.launches
        if launches < 0 or launches % layers:
            raise BenchError(
                f"{layers} layers more have {launches} launches of {name} more, which is no "
                "multiple: the layers of this model differ, and there is no number per layer. "
                "Choose a model of equal layers."
            )
        if launches:
            found[name] = (more - less).times(1 / layers)
    return found


def at_context(near: tuple[int, Works], far: tuple[int, Works], context: int) -> Works:
    """Return the work at another context, along the line through two.

    Args:
        near: a context in tokens, and a layer's work there.
        far: the same at a longer one.
        context: tokens.

    Raises:
        BenchError: the launches differ, so nothing is linear.
    """
    (start, first), (stop, second) = near, far
    if {name: work.launches for name, work in first.items()} != {
        name: work.launches for name, work in second.items()
    }:
        raise BenchError(
            f"a layer launches other operators at context {start} than at {stop}; its work at "
            f"context {context} cannot be told. Use --context {start} or less."
        )
    share = (context - start) / (stop - start)
    return {name: work + (second[name] - work).times(share) for name, work in first.items()}


def with_attention(works: Works, flops: int) -> Works:
    """Return the work with the products of attention, which a trace does not know."""
    return {
        name: replace(work, flops=flops) if name.startswith(ATTENTION) else work
        for name, work in works.items()
    }


def with_kernel(works: Works, moved: float, cycles: float) -> Works:
    """Return the work with the kernel of attention as it ran at another context.

    Args:
        works: of a layer.
        moved: bytes that the kernel moves there, without its workspace.
        cycles: of its estimate there.
    """
    return {
        name: replace(work, bytes=moved, cycles=cycles) if name.startswith(KERNEL) else work
        for name, work in works.items()
    }
