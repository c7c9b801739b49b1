"""Where variants break: the claims that docs/accuracy.md makes about drawn values."""

from __future__ import annotations

import pytest

from ascend_plugin.kv_eval.synthetic import CASES, SyntheticRow, as_dict, run_case, run_cases


@pytest.fixture(scope="module")
def errors():
    rows = run_cases(1, 0, lambda *_: None)
    assert {row.case for row in rows} == {case.name for case in CASES}
    return {(row.case, row.errors.variant): row.errors for row in rows}


def test_rotated_keys_have_no_outlier_channels(errors):
    dynamic, static = (errors["outlier channels", name] for name in ("c8d", "c8s"))
    assert dynamic.eps_k < 0.007  # as of normal numbers; 0.02 and more without the rotation
    assert dynamic.attn_rel_l2 < 2 * static.attn_rel_l2


@pytest.mark.parametrize("case", ["sinks", "heavy tails", "strangers"])
def test_uneven_tokens_break_static_scales(errors, case):
    dynamic, static = (errors[case, name].attn_rel_l2 for name in ("c8d", "c8s"))
    assert static > 2 * dynamic
    assert errors[case, "c8d"].outlier_share_v == 0


@pytest.mark.parametrize("patched", ["c8p-int4", "c8p-e3m0"])
@pytest.mark.parametrize("case", [case.name for case in CASES])
def test_patches_never_harm_and_mend_outliers(errors, case, patched):
    static, mended = errors[case, "c8s"], errors[case, patched]
    assert mended.attn_rel_l2 <= 1.01 * static.attn_rel_l2
    assert mended.attn_rel_l2_outliers * 2 <= static.attn_rel_l2_outliers
    assert mended.eps_v_outliers * 2 <= static.eps_v_outliers
    assert mended.patched_share > 0


def test_strangers_saturate(errors):
    assert errors["strangers", "c8s"].saturated_share > 0.01
    assert errors["strangers", "c8d"].saturated_share == 0


def test_rows_for_json():
    row = as_dict(SyntheticRow(CASES[0].name, run_case(CASES[0], 1, 1)[0]))
    assert row["case"] == CASES[0].name
    assert "layer" not in row
    assert {"variant", "attn_rel_l2", "eps_k", "patched_share"} <= set(row)
