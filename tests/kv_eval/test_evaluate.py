"""Evaluation: what the numbers mean, and what is refused."""

from __future__ import annotations

import math
from dataclasses import asdict

import pytest
import torch

from ascend_plugin.kv_cache import PageFormat
from ascend_plugin.kv_cache.scales import KVScalesError, load_kv_scales
from ascend_plugin.kv_eval import KVEvalError
from ascend_plugin.kv_eval.calibrate import calibrate_into, describe
from ascend_plugin.kv_eval.evaluate import Predictions, evaluate, make_statics
from ascend_plugin.kv_eval.pages import PagedSequence, Statics
from ascend_plugin.kv_eval.plot import plot
from ascend_plugin.kv_eval.routing import LayerCall
from ascend_plugin.kv_eval.state import StateFile
from ascend_plugin.kv_eval.text import cut_windows, read_texts
from ascend_plugin.kv_eval.variants import BASELINE, EXACT, VARIANTS, choose_variants
from ascend_plugin.ops.page_layout import Quantisation

#: What the issue asks of every row.
WANTED = {
    *("variant", "ppl", "ppl_delta", "kl_mean", "kl_p99", "top1_agreement", "attn_rel_l2"),
    *("eps_k", "eps_v", "outlier_share_k", "outlier_share_v", "patched_share"),
    *("bytes_per_token", "tokens"),
}


@pytest.fixture(scope="module")
def scales_path(model, text_path, tmp_path_factory):
    path = tmp_path_factory.mktemp("scales") / "scales.safetensors"
    windows = cut_windows(read_texts([text_path]), model.tokenizer, 160, 480)
    about = describe(model, windows, "text")
    calibrate_into(path, model, windows, about, StateFile(path, about), lambda *_: None)
    return path


@pytest.fixture(scope="module")
def outcome(model, text_path, scales_path):
    windows = cut_windows(read_texts([text_path]), model.tokenizer, 200, 400)
    statics = make_statics(model, load_kv_scales(scales_path)[0], "scales", None)
    variants = choose_variants(("fp32", *VARIANTS), with_scales=True)
    return evaluate(model, windows, variants, statics, lambda *_: None)


def test_one_row_per_variant_and_one_per_layer(outcome):
    assert [row.variant for row in outcome.rows] == list(VARIANTS)
    assert set(asdict(outcome.rows[0])) >= WANTED
    assert {(row.variant, row.layer) for row in outcome.layers} == {
        (name, layer) for name in VARIANTS for layer in range(2)
    }
    for row in outcome.rows:
        assert row.tokens == 400
        assert all(math.isfinite(v) for v in asdict(row).values() if isinstance(v, float))


def test_the_baseline_equals_itself(outcome):
    row = outcome.rows[0]
    assert (row.ppl_delta, row.kl_mean, row.top1_agreement, row.attn_rel_l2) == (0, 0, 1, 0)
    assert 0 < row.eps_k < 0.003  # a float32 model: bfloat16 pages round
    exact = outcome.rows[1]
    assert (exact.eps_k, exact.eps_v) == (0, 0)
    assert 0 < exact.attn_rel_l2 < 0.01


def test_quantised_variants_are_close_and_not_equal(outcome):
    for row in outcome.rows[2:]:
        assert 0 < row.kl_mean < 0.05, row
        assert row.kl_p99 > row.kl_mean
        assert 0.9 < row.top1_agreement <= 1
        assert 0.001 < row.attn_rel_l2 < 0.1
        assert 0.003 < row.eps_k < 0.03


def test_bytes_are_those_of_the_pages(outcome):
    for row in outcome.rows:
        variant = VARIANTS[row.variant]
        page = PageFormat(variant.dtype, 128, 2, 32, variant.quantisation, variant.patch_code)
        assert row.bytes_per_token == 2 * page.page_bytes / 128


def test_layers_see_the_same_values(model, text_path, scales_path, outcome):
    """A variant's rows do not depend on which others run: errors of layers do not pass on."""
    windows = cut_windows(read_texts([text_path]), model.tokenizer, 200, 400)
    statics = make_statics(model, load_kv_scales(scales_path)[0], "scales", None)
    alone = evaluate(model, windows, (BASELINE, VARIANTS["c8s"]), statics, lambda *_: None)
    both = [row for row in outcome.layers if row.variant == "c8s"]
    assert [row for row in alone.layers if row.variant == "c8s"] == both


def test_patches_help_where_c8s_has_outliers(model, text_path, scales_path):
    """A low threshold makes many rows outliers: patched ones are much better."""
    windows = cut_windows(read_texts([text_path]), model.tokenizer, 200, 400)
    statics = make_statics(model, load_kv_scales(scales_path)[0], "scales", 0.011)
    variants = choose_variants((), with_scales=True)
    rows = evaluate(model, windows, variants, statics, lambda *_: None).rows
    by_name = {row.variant: row for row in rows}
    assert by_name["c8s"].patched_share == by_name["c8d"].patched_share == 0
    for name in ("c8p-int4", "c8p-e3m0"):
        assert by_name[name].patched_share > 0.005
        assert by_name[name].eps_k_outliers < by_name["c8s"].eps_k_outliers
        assert by_name[name].attn_rel_l2 < by_name["c8s"].attn_rel_l2
        assert by_name[name].attn_rel_l2_outliers < by_name["c8s"].attn_rel_l2_outliers
        assert by_name[name].outlier_share_k < by_name["c8s"].outlier_share_k


def test_predictions_against_float64():
    generator = torch.Generator().manual_seed(0)
    baseline = torch.randn(300, 50, generator=generator)
    ours = baseline + 0.1 * torch.randn(300, 50, generator=generator)
    targets = torch.randint(50, (300,), generator=generator)
    predictions = Predictions()
    for rows in (slice(0, 100), slice(100, 300)):
        predictions.compare(ours[rows], baseline[rows], targets[rows])
    numbers = predictions.numbers()
    p, q = (x.double().log_softmax(-1) for x in (baseline, ours))
    kl = (p.exp() * (p - q)).sum(-1)
    assert numbers["kl_mean"] == pytest.approx(float(kl.mean()), rel=1e-4)
    assert numbers["kl_p99"] == pytest.approx(float(kl.quantile(0.99)), rel=1e-4)
    assert numbers["ppl"] == pytest.approx(
        math.exp(torch.nn.functional.nll_loss(q, targets)), rel=1e-5
    )
    assert numbers["top1_agreement"] == float((p.argmax(-1) == q.argmax(-1)).double().mean())


@pytest.mark.parametrize("variant", VARIANTS.values(), ids=list(VARIANTS))
def test_pages_are_read_as_they_attend(variant):
    """Attention over what ``read`` returns is attention over the pages."""
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(200, 4, 32, generator=generator)
    key, value = torch.randn(2, 200, 2, 32, generator=generator)
    call = LayerCall(0, query, key, value, 32**-0.5)
    scales = torch.stack((key, value)).abs().amax(1) / 127
    pages, exact = PagedSequence(variant, 200), PagedSequence(EXACT, 200)
    for seed in (1, 2):  # pages that another layer has used
        stale = torch.randn(2, 190, 2, 32, generator=generator) * seed
        pages.write(stale[0], stale[1], Statics(scales, (0.005, 0.005)))
    counters = pages.write(key, value, Statics(scales, (0.01, 0.01)))
    exact.write(*pages.read())
    # Kernels for bfloat16 pages round queries and weights to bfloat16 too.
    tolerance = 1e-2 if variant is BASELINE else 2e-3
    torch.testing.assert_close(
        pages.attend(query, call), exact.attend(query, call), rtol=tolerance, atol=tolerance
    )
    if variant.quantisation is Quantisation.C8P:
        assert counters[2] > 0
    if variant is EXACT:
        assert torch.equal(pages.read()[0], key)


def test_choosing_variants():
    def names(*wanted, with_scales=True):
        return [v.name for v in choose_variants(wanted, with_scales=with_scales)]

    assert names() == ["bf16", "c8d", "c8s", "c8p-int4", "c8p-e3m0"]
    assert names(with_scales=False) == ["bf16", "c8d"]
    assert names("c8s,c8d", "c8s") == ["bf16", "c8s", "c8d"]
    default = PageFormat(torch.int8, 128, 1, 32, Quantisation.C8P).patch_code
    assert names("c8p") == ["bf16", f"c8p-{default.name.lower()}"]
    with pytest.raises(KVEvalError, match=r"--variants c4.*bf16, fp32, c8d"):
        names("c4")
    with pytest.raises(KVEvalError, match=r"c8s needs --scales.*calibrate kv"):
        names("c8s", with_scales=False)


@pytest.mark.parametrize(
    "arguments, words",
    [
        ({"layers": 1}, r"no scales for layer 1"),
        ({"kv_heads": 4}, r"4 kv heads.*2 kv heads"),
        ({"head_dim": 64}, r"64"),
    ],
)
def test_scales_of_another_model(model, save_scales, arguments, words):
    scales, _ = load_kv_scales(save_scales(**arguments))
    with pytest.raises(KVScalesError, match=words):
        make_statics(model, scales, "FILE", None)


def test_c8p_needs_a_threshold(model, save_scales, text_path):
    windows = cut_windows(read_texts([text_path]), model.tokenizer, 160, 160)
    scales, _ = load_kv_scales(save_scales(error=None))
    variants = choose_variants(("c8s", "c8p"), with_scales=True)
    with pytest.raises(KVEvalError, match="--threshold"):
        evaluate(model, windows, variants, make_statics(model, scales, "x", None), lambda *_: None)
    evaluate(model, windows, variants, make_statics(model, scales, "x", 0.02), lambda *_: None)


@pytest.mark.parametrize("suffix, start", [(".png", b"\x89PNG"), (".svg", b"<?xml")])
def test_plots(outcome, tmp_path, suffix, start):
    path = tmp_path / f"layers{suffix}"
    plot(outcome.layers, "tiny, 400 tokens", path)
    assert path.read_bytes().startswith(start)
