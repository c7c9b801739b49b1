"""A picture of a linear result: how many times faster than bfloat16 and than vLLM's own."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ascend_plugin.bench.linear.cases import scheme_label
from ascend_plugin.bench.linear.rows import LinearRow

_BF16, _STOCK, _BASELINE, _PROBLEM = "#2f6db2", "#d08c2c", "#555555", "#b03a2e"


def plot(rows: Sequence[LinearRow], title: str, path: Path) -> None:
    """Draw two bars per row and write the file; :func:`check_plot_path` refused bad paths.

    Args:
        rows: the result.
        title: machine and threads.
        path: ``.png`` or ``.svg``.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8.0, 1.5 + 0.6 * len(rows)), layout="constrained")
    axes = figure.add_subplot()
    positions = range(len(rows))
    # A failed row has no ratio, hence no bar.
    against = [row.ratio_vs_bf16 or 0.0 for row in rows]
    stock = [row.ratio_vs_stock or 0.0 for row in rows]
    axes.barh([p - 0.2 for p in positions], against, 0.36, color=_BF16, label="bfloat16 (oneDNN)")
    axes.barh([p + 0.2 for p in positions], stock, 0.36, color=_STOCK, label="vLLM, same scheme")
    for position, row in enumerate(rows):
        _annotate(axes, position - 0.2, row, row.ratio_vs_bf16, row.bf16_time_ms)
        if row.stock_time_ms is not None:
            _annotate(axes, position + 0.2, row, row.ratio_vs_stock, row.stock_time_ms)
    axes.axvline(1.0, color=_BASELINE, linewidth=1.0, linestyle="--")
    axes.set_yticks(positions, [_label(row) for row in rows])
    axes.invert_yaxis()
    # Room for the annotations, which begin where the bars end.
    axes.set_xlim(0.0, max(1.0, *against, *stock) * 1.5)
    axes.set_xlabel("times as fast (dashed: equal)")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(loc="lower right", fontsize=8)
    axes.set_title(title, fontsize=10, loc="left")
    figure.savefig(path, dpi=150)


def _annotate(
    axes: object, height: float, row: LinearRow, ratio: float | None, other: float
) -> None:
    text = f"{ratio:.2f}× ({row.time_ms:.3g} ms, {other:.3g} ms)" if ratio else "parity failed"
    axes.annotate(  # type: ignore[attr-defined]
        text,
        (ratio or 0.0, height),
        (4, 0),
        textcoords="offset points",
        va="center",
        fontsize=7,
        color="black" if ratio else _PROBLEM,
    )


def _label(row: LinearRow) -> str:
    return f"{scheme_label(row.scheme, row.group, row.k)}, {row.n}×{row.k}, {row.m} rows"
