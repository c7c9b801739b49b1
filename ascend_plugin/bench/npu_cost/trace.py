"""Launches of a step, read from the simulator's trace, and what one layer adds to them."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ascend_plugin.bench.errors import BenchError

#: The fused attention, in every version; its lengths are numbers, so its products are not in the
#: trace.
ATTENTION = "aclnnFusedInferAttentionScore"

#: Writes new tokens into the KV cache.
KV_WRITE = "aclnnScatterPaKvCache"

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
    """

    launches: int = 0
    bytes: float = 0
    flops: float = 0

    def __add__(self, other: Work) -> Work:
        """Return both together."""
        return Work(
            self.launches + other.launches, self.bytes + other.bytes, self.flops + other.flops
        )


#: The work of a step, or of a layer, by operator.
Works = dict[str, Work]


def read_step(path: Path, begin: int, end: int) -> Works:
    """Return the work between two places of a trace.

    Args:
        path: the trace.
        begin: bytes before the first line.
        end: bytes up to the last line's end.
    """
    with path.open("rb") as file:
        file.seek(begin)
        return add_up(json.loads(line) for line in file.read(end - begin).splitlines())


def add_up(launches: Iterable[Mapping[str, Any]]) -> Works:
    """Return the work of launches by operator, in the order in which operators first appear."""
    works: Works = {}
    for launch in launches:
        name = str(launch["operator"])
        works[name] = works.get(name, Work()) + Work(1, _bytes(launch), _flops(launch))
    return works


def _bytes(launch: Mapping[str, Any]) -> int:
    """Return what a launch moves; of the table of cosines and sines, the rows that it reads."""
    moved = int(launch["bytes"])
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
            found[name] = Work(
                launches // layers,
                (more.bytes - less.bytes) / layers,
                (more.flops - less.flops) / layers,
            )
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
    return {
        name: Work(
            work.launches,
            work.bytes + share * (second[name].bytes - work.bytes),
            work.flops + share * (second[name].flops - work.flops),
        )
        for name, work in first.items()
    }


def with_attention(works: Works, flops: int) -> Works:
    """Return the work with the products of the fused attention, which a trace does not know."""
    return {
        name: Work(work.launches, work.bytes, flops) if name.startswith(ATTENTION) else work
        for name, work in works.items()
    }
