"""A picture of an evaluation: what each checkpoint costs, and in which layers."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ascend_plugin.weight_tools.evaluate import WeightRow
from ascend_plugin.weight_tools.layers import LayerRow


def plot(rows: Sequence[WeightRow], layers: Sequence[LayerRow], title: str, path: Path) -> None:
    """Draw perplexity over size, and the error of every layer.

    Args:
        rows: the float model first.
        layers: of every checkpoint.
        title: model and tokens.
        path: ``.png`` or ``.svg``.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11.0, 4.5), layout="constrained")
    sizes, errors = figure.subplots(1, 2)
    for row in rows:
        sizes.plot(row.bytes / 1e6, row.ppl, "o", markersize=5)
        sizes.annotate(
            row.model,
            (row.bytes / 1e6, row.ppl),
            xytext=(4, 4),
            textcoords="offset points",
            fontsize=8,
        )
    sizes.set_xlabel("MB")
    sizes.set_title("perplexity", fontsize=10, loc="left")
    for name in dict.fromkeys(row.model for row in layers):
        own = [row for row in layers if row.model == name]
        points = [row.layer for row in own], [row.error for row in own]
        errors.plot(*points, label=name, marker="o", markersize=3, linewidth=1.2)
    errors.set_yscale("log")
    errors.set_xlabel("layer")
    errors.set_title("output of the layer, relative L2 error", fontsize=10, loc="left")
    errors.legend(frameon=False, fontsize=8)
    for axes in (sizes, errors):
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(True, axis="y", linewidth=0.3)
    figure.suptitle(title, fontsize=10, x=0.01, ha="left")
    figure.savefig(path, dpi=150)
