"""A picture of an attention result: how many times faster than vLLM's CPU attention."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ascend_plugin.bench.attention.rows import AttentionRow

_BAR, _BASELINE, _PROBLEM = "#2f6db2", "#555555", "#b03a2e"


def plot(rows: Sequence[AttentionRow], title: str, path: Path) -> None:
    """Draw one bar per row and write the file.

    Args:
        rows: the result.
        title: machine and threads.
        path: ``.png`` or ``.svg``.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8.0, 1.3 + 0.5 * len(rows)), layout="constrained")
    axes = figure.add_subplot()
    positions = range(len(rows))
    # A failed row has no ratio, hence no bar.
    ratios = [row.ratio_vs_stock or 0.0 for row in rows]
    axes.barh(positions, ratios, height=0.6, color=_BAR)
    for position, row, ratio in zip(positions, rows, ratios, strict=True):
        text, colour = _annotation(row)
        axes.annotate(
            text,
            (ratio, position),
            (5, 0),
            textcoords="offset points",
            va="center",
            color=colour,
        )
    axes.axvline(1.0, color=_BASELINE, linewidth=1.0, linestyle="--")
    axes.set_yticks(positions, [_label(row) for row in rows])
    axes.invert_yaxis()
    # Room for the annotations, which begin where the bars end.
    axes.set_xlim(0.0, max(1.0, *ratios) * 1.6)
    axes.set_xlabel("times as fast as vLLM's CPU attention (dashed: equal)")
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_title(title, fontsize=10, loc="left")
    figure.savefig(path, dpi=150)


def _annotation(row: AttentionRow) -> tuple[str, str]:
    """Return the text beside a bar and its colour."""
    if not row.parity_ok:
        return "parity failed", _PROBLEM
    if row.ratio_vs_stock is None or row.stock_time_ms is None:
        return f"{row.time_ms:.3g} ms; vLLM does not run this", "black"
    times = f"{row.time_ms:.3g} ms, vLLM {row.stock_time_ms:.3g} ms"
    return f"{row.ratio_vs_stock:.2f}× ({times})", "black"


def _label(row: AttentionRow) -> str:
    if row.phase == "write":
        return f"write {row.variant}, {row.batch} tokens"
    if row.phase == "prefill":
        return f"prefill {row.variant}, {row.batch} × {row.new_tokens} new of {row.context}"
    return f"decode {row.variant}, {row.batch} × {row.context}"
