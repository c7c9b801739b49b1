"""Results of ``eval weights`` as a table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from rich.table import Table

from ascend_plugin.weight_tools.evaluate import WeightRow


def weight_table(rows: Sequence[WeightRow], meta: Mapping[str, object]) -> Table:
    """Return the table of ``eval weights``."""
    title = (
        f"{meta['model']}, {meta['tokens']} tokens in windows of {meta['context']}, {meta['dtype']}"
    )
    table = Table(title=title, title_justify="left", box=None, pad_edge=False, header_style="bold")
    names = "checkpoint|scheme|ppl|Δ|KL mean|KL p99|top-1|layer error|MB|bits/weight"
    for i, name in enumerate(names.split("|")):
        table.add_column(name, justify="right" if i > 1 else "left")
    for row in rows:
        table.add_row(
            row.model,
            row.scheme,
            f"{row.ppl:.3f}",
            f"{row.ppl_delta:+.3%}",
            f"{row.kl_mean:.2e}",
            f"{row.kl_p99:.2e}",
            f"{row.top1_agreement:.2%}",
            f"{row.layer_error:.3g}",
            f"{row.bytes / 1e6:.1f}",
            f"{row.bits_per_weight:.2f}",
        )
    return table
