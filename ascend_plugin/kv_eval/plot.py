"""A picture of an evaluation: what each variant does to each layer."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ascend_plugin.kv_eval.probe import LayerRow
from ascend_plugin.kv_eval.variants import BASELINE

_PANELS = (
    ("attn_rel_l2", "attention output, relative L2 error"),
    ("attn_rel_l2_outliers", "the same, only c8s's outliers quantised"),
    ("eps_k", "K, mean relative error of a row"),
    ("eps_v", "V, mean relative error of a row"),
)
_COLOURS = {
    "fp32": "#888888",
    "c8d": "#2f6db2",
    "c8s": "#b03a2e",
    "c8p-int4": "#2e8b57",
    "c8p-e3m0": "#8e6bb0",
}


def plot(rows: Sequence[LayerRow], title: str, path: Path) -> None:
    """Draw one line per variant in four panels and write the file.

    Args:
        rows: of every variant and layer.
        title: model and tokens.
        path: ``.png`` or ``.svg``.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11.0, 7.0), layout="constrained")
    panels = figure.subplots(2, 2, sharex=True).flatten()
    names = list(dict.fromkeys(row.variant for row in rows if row.variant != BASELINE.name))
    for axes, (field, caption) in zip(panels, _PANELS, strict=True):
        for name in names:
            points = [
                (row.layer, value)
                for row in rows
                if row.variant == name and (value := getattr(row, field))
            ]
            if points:
                axes.plot(
                    *zip(*points, strict=True),
                    label=name,
                    color=_COLOURS.get(name),
                    marker="o",
                    markersize=3,
                    linewidth=1.2,
                )
                axes.set_yscale("log")
        axes.set_title(caption, fontsize=10, loc="left")
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(True, axis="y", linewidth=0.3)
    for axes in panels[2:]:
        axes.set_xlabel("layer")
    handles, labels = panels[0].get_legend_handles_labels()
    if handles:
        figure.legend(handles, labels, loc="outside right upper", frameon=False)
    figure.suptitle(title, fontsize=10, x=0.01, ha="left")
    figure.savefig(path, dpi=150)
