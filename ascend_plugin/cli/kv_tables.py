"""Results of ``calibrate`` and ``eval`` as tables."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from rich.table import Table

from ascend_plugin.kv_eval.calibrate import CalibratedRow
from ascend_plugin.kv_eval.evaluate import EvalRow
from ascend_plugin.kv_eval.synthetic import SyntheticRow


def calibration_table(rows: Sequence[CalibratedRow], meta: Mapping[str, object]) -> Table:
    """Return the table of ``calibrate kv``."""
    title = f"calibration of {meta['model']}, {meta['tokens']} tokens, {meta['dtype']}"
    table = _table(title, ("layer", "largest K", "largest V", "error of K", "error of V"))
    for row in rows:
        numbers = (row.k_absmax, row.v_absmax, row.k_error, row.v_error)
        table.add_row(str(row.layer), *(f"{number:.4g}" for number in numbers))
    return table


def eval_table(rows: Sequence[EvalRow], meta: Mapping[str, object]) -> Table:
    """Return the table of ``eval kv``."""
    title = (
        f"{meta['model']}, {meta['tokens']} tokens in windows of {meta['context']}, {meta['dtype']}"
    )
    names = "variant|ppl|Δ|KL mean|KL p99|top-1|attention|of outliers|ε of K|ε of V"
    names += "|outliers K|V|patched|no slot|bytes/token"
    table = _table(title, names.split("|"))
    for row in rows:
        table.add_row(
            row.variant,
            f"{row.ppl:.3f}",
            f"{row.ppl_delta:+.3%}",
            f"{row.kl_mean:.2e}",
            f"{row.kl_p99:.2e}",
            f"{row.top1_agreement:.2%}",
            _number(row.attn_rel_l2),
            _number(row.attn_rel_l2_outliers),
            _number(row.eps_k),
            _number(row.eps_v),
            f"{row.outlier_share_k:.2%}",
            f"{row.outlier_share_v:.2%}",
            f"{row.patched_share:.2%}",
            f"{row.overflow_share:.2%}",
            f"{row.bytes_per_token:g}",
        )
    return table


def synthetic_table(rows: Sequence[SyntheticRow]) -> Table:
    """Return the table of ``eval kv-synthetic``."""
    names = "case|variant|attention|of outliers|ε of K|ε of V"
    names += "|outliers K|V|patched|no slot|saturated"
    table = _table("drawn queries, keys and values", names.split("|"))
    case = None
    for row in rows:
        errors = row.errors
        table.add_row(
            "" if row.case == case else row.case,
            errors.variant,
            _number(errors.attn_rel_l2),
            _number(errors.attn_rel_l2_outliers),
            _number(errors.eps_k),
            _number(errors.eps_v),
            f"{errors.outlier_share_k:.2%}",
            f"{errors.outlier_share_v:.2%}",
            f"{errors.patched_share:.2%}",
            f"{errors.overflow_share:.2%}",
            f"{errors.saturated_share:.2%}",
        )
        case = row.case
    return table


def _table(title: str, columns: Sequence[str]) -> Table:
    table = Table(title=title, title_justify="left", box=None, pad_edge=False, header_style="bold")
    for i, name in enumerate(columns):
        table.add_column(name, justify="right" if i else "left")
    return table


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.3g}"
