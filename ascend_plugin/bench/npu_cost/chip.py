"""What a chip can do at most, as published, and how long work takes at that rate."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from ascend_plugin.bench.npu_cost.trace import Work

Bound = Literal["memory", "cube", "vector"]


@dataclass(frozen=True, slots=True)
class Chip:
    """Peak rates of one NPU as torch_npu counts them.

    Attributes:
        name: of the chip.
        memory: bytes per second of its high-bandwidth memory.
        cube: operations per second of its matrix units in bfloat16.
        vector: bytes per second that its vector units take in.
        source: where the rates are published.
    """

    name: str
    memory: float
    cube: float
    vector: float
    source: str


#: A package has two dies with half of its rates each; each die is a device of its own.
ASCEND_910C_DIE = Chip(
    name="Ascend 910C, one die",
    memory=3.2e12 / 2,
    cube=752e12 / 2,
    vector=48 * 128 * 1.85e9,
    source=(
        "arXiv:2506.12708 (Serving Large Language Models on Huawei CloudMatrix384): a 910C package "
        "has 752 TFLOPS of dense BF16 and 3.2 TB/s, half of them per die. Vector units: CANN's "
        "platform configuration of the 910B1, of the same generation: 48 vector cores, "
        "vec_calc_size 128 bytes per cycle, 1850 MHz"
    ),
)


@dataclass(frozen=True, slots=True)
class Estimate:
    """How long work takes at least.

    Attributes:
        bound: what most of the time is spent on.
        us: microseconds, without launches, synchronisation and waiting for the host.
    """

    bound: Bound
    us: float


def estimate(works: Iterable[Work], chip: Chip) -> Estimate:
    """Return the roofline of operators that run one after the other.

    Each takes the longest of: its bytes through the memory, its products through the cube units,
    and, if it has no products, its bytes once through the vector units.
    """
    spent: dict[Bound, float] = {"memory": 0.0, "cube": 0.0, "vector": 0.0}
    for work in works:
        times: dict[Bound, float] = {
            "memory": work.bytes / chip.memory,
            "cube": work.flops / chip.cube,
            "vector": 0.0 if work.flops else work.bytes / chip.vector,
        }
        bound = max(times, key=lambda name: times[name])
        spent[bound] += 1e6 * times[bound]
    return Estimate(max(spent, key=lambda name: spent[name]), sum(spent.values()))
