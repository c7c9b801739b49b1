"""Keys and values that are harder than a small model's: where does each variant break?

Every case calibrates static scales on some sequences and evaluates on others, drawn alike except
where the case says so. Queries are scaled so that every channel matters equally for the scores.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass

import torch

from ascend_plugin.kv_eval.calibrate import Progress, Statistics
from ascend_plugin.kv_eval.geometry import Geometry
from ascend_plugin.kv_eval.pages import OUTLIER_FACTOR, Statics
from ascend_plugin.kv_eval.probe import LayerProbe, LayerRow, Workspace
from ascend_plugin.kv_eval.routing import LayerCall
from ascend_plugin.kv_eval.variants import choose_variants

GEOMETRY = Geometry(heads=8, kv_heads=2, head_dim=64)
TOKENS = 1024
_CALIBRATION_ROUNDS = 4


@dataclass(frozen=True, slots=True)
class Tensors:
    """One sequence: ``[tokens, heads, head_dim]`` and twice ``[tokens, kv_heads, head_dim]``."""

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor


@dataclass(frozen=True, slots=True)
class Case:
    """One kind of difficulty.

    Attributes:
        name: short.
        summary: one line.
        change: makes normal numbers difficult, in place; told whether they are for calibration.
    """

    name: str
    summary: str
    change: Callable[[Tensors, torch.Generator, bool], None]


@dataclass(frozen=True, slots=True)
class SyntheticRow:
    """What one variant does in one case; ``errors.layer`` has no meaning."""

    case: str
    errors: LayerRow


def _plain(t: Tensors, generator: torch.Generator, calibrating: bool) -> None:
    """Change nothing."""


def _outlier_channels(t: Tensors, generator: torch.Generator, calibrating: bool) -> None:
    t.key[..., [5, 37]] *= 30.0
    t.query[..., [5, 37]] /= 30.0
    t.value[..., 11] *= 10.0


def _sinks(t: Tensors, generator: torch.Generator, calibrating: bool) -> None:
    t.query[..., 3] = t.query[..., 3].abs() + 1.0
    t.key[..., 3] -= 1.0
    for position in (0, 1, TOKENS // 2):
        t.key[position] *= 0.2
        t.key[position, :, 3] = 40.0
        t.value[position] *= 0.02


def _heavy_tails(t: Tensors, generator: torch.Generator, calibrating: bool) -> None:
    for rows in (t.key, t.value):
        sizes = torch.randn(rows.shape[:2], generator=generator).exp()  # log-normal
        rows *= sizes[..., None]


def _strangers(t: Tensors, generator: torch.Generator, calibrating: bool) -> None:
    if not calibrating:
        strange = torch.rand(TOKENS, generator=generator) < 1 / 64
        t.key[strange] *= 3.0
        t.value[strange] *= 8.0


CASES = (
    Case("plain", "normal numbers", _plain),
    Case("outlier channels", "2 channels of K 30 times, 1 of V 10 times", _outlier_channels),
    Case("sinks", "3 tokens with one huge channel of K and hardly any V", _sinks),
    Case("heavy tails", "sizes of tokens are log-normal", _heavy_tails),
    Case("strangers", "1 token in 64 far beyond the calibrated range", _strangers),
)


def run_cases(rounds: int, seed: int, report: Progress) -> list[SyntheticRow]:
    """Evaluate every variant in every case.

    Args:
        rounds: sequences to evaluate.
        seed: of the random numbers.
        report: told of each case.
    """
    rows = []
    for i, case in enumerate(CASES):
        report(case.name, i, len(CASES))
        rows += [SyntheticRow(case.name, row) for row in run_case(case, rounds, seed)]
    report("done", len(CASES), len(CASES))
    return rows


def method(rounds: int, seed: int) -> dict[str, object]:
    """Return the part of ``meta`` that describes the method."""
    return {
        "tokens": rounds * TOKENS,
        "context": TOKENS,
        "seed": seed,
        "geometry": asdict(GEOMETRY),
        "cases": {case.name: case.summary for case in CASES},
    }


def as_dict(row: SyntheticRow) -> dict[str, object]:
    """Return a row for JSON: the case, and the errors without the layer."""
    errors = asdict(row.errors)
    del errors["layer"]
    return {"case": row.case, **errors}


def run_case(case: Case, rounds: int, seed: int) -> list[LayerRow]:
    """Calibrate and evaluate one case; one row per variant."""
    generator = torch.Generator().manual_seed(seed)
    statics = _calibrate(case, generator)
    variants = choose_variants((), with_scales=True)
    probe = LayerProbe(0, GEOMETRY, Workspace(variants, TOKENS), statics)
    for _ in range(rounds):
        probe.measure(_draw(case, generator, calibrating=False))
    return probe.rows()


def _calibrate(case: Case, generator: torch.Generator) -> Statics:
    statistics = Statistics({0: GEOMETRY})
    calls = [_draw(case, generator, calibrating=True) for _ in range(_CALIBRATION_ROUNDS)]
    for call in calls:
        statistics.see_values(call)
    scales = statistics.scales(0).contiguous()
    for call in calls:
        statistics.see_errors(call, scales)
    k_error, v_error = (statistics.errors[0][:, 0] / statistics.errors[0][:, 1]).tolist()
    return Statics(scales, (OUTLIER_FACTOR * k_error, OUTLIER_FACTOR * v_error))


def _draw(case: Case, generator: torch.Generator, *, calibrating: bool) -> LayerCall:
    def normal(heads: int) -> torch.Tensor:
        return torch.randn(TOKENS, heads, GEOMETRY.head_dim, generator=generator)

    drawn = Tensors(
        1.5 * normal(GEOMETRY.heads), normal(GEOMETRY.kv_heads), normal(GEOMETRY.kv_heads)
    )
    case.change(drawn, generator, calibrating)
    # bfloat16, as a model would: then bf16 pages are exact.
    query, key, value = (x.bfloat16() for x in (drawn.query, drawn.key, drawn.value))
    return LayerCall(0, query, key, value, GEOMETRY.head_dim**-0.5)
