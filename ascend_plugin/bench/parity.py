"""When is a measured result right?"""

from __future__ import annotations

from dataclasses import dataclass

from ascend_plugin.bench.elements import Element

#: Largest relative L2 error of the whole output, given the contents of the pages. The output's own
#: rounding costs 0.0017, 0.0002 and 0.00000003; the rest is room for sums in other orders and for
#: probabilities rounded to the page's type, or to 8 bits.
TOLERANCES: dict[Element, float] = {"bf16": 5e-3, "fp16": 1e-3, "fp32": 1e-5}
FAST_TOLERANCE = 2.5e-2


@dataclass(frozen=True, slots=True)
class Parity:
    """Outcome of a comparison.

    Attributes:
        ok: the result is right.
        rel_l2: relative L2 error against float64; None when it is not a finite number.
    """

    ok: bool
    rel_l2: float | None
