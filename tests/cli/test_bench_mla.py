"""``bench mla`` at tiny sizes: what it prints, what it refuses, what it never claims."""

from __future__ import annotations

import json
from dataclasses import fields

import pytest
from machine_keys import MACHINE_KEYS

from ascend_plugin.bench.mla.cases import VARIANTS, MlaRow

TINY = (
    *("bench", "mla", "--threads", "1", "--seconds", "0.05", "--batch", "2", "--context", "96"),
    *("--heads", "4", "--block-size", "32"),
)


def test_every_variant_against_vllm(run_cli):
    chosen = [argument for variant in VARIANTS for argument in ("--variant", variant)]
    done = run_cli(*TINY, *chosen, "--json")
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert set(result["meta"]) >= MACHINE_KEYS
    assert [row["variant"] for row in result["rows"]] == list(VARIANTS)
    for row in result["rows"]:
        assert set(row) == {field.name for field in fields(MlaRow)}
        assert row["parity_ok"] is True, row
        assert row["ratio_vs_stock"] > 0
        assert row["stock_rel_l2_vs_fp64"] < 0.02
        assert row["note"] is None
    assert [row["bytes_per_token"] for row in result["rows"]] == [
        1152,
        1152,
        2304,
        *[644] * 2,
        *[640] * 2,
    ]


def test_what_vllm_does_not_run_has_a_note_and_no_ratio(run_cli):
    for more, words in (
        (("--latent-dim", "64", "--rotary-dim", "16"), "512 and 64 only"),
        (("--new-tokens", "3"), "one token per sequence"),
    ):
        done = run_cli(*TINY, *more)
        assert done.returncode == 0, done.stderr
        assert words in " ".join(done.stdout.split())


@pytest.mark.parametrize(
    "arguments, words",
    [
        (("--variant", "c8p"), ("--variant c8p", "c8d-fast")),
        (("--latent-dim", "40"), ("kv_lora_rank) 40", "multiples of 16")),
        (("--new-tokens", "97"), ("--new-tokens 97 exceeds --context 96",)),
        (("--rotary-dim", "0"), ("--rotary-dim 0", "at least 1")),
    ],
)
def test_refusals_say_what_is_allowed(run_cli, arguments, words):
    done = run_cli(*TINY, *arguments)
    assert done.returncode == 1
    assert done.stdout == ""
    for word in words:
        assert word in done.stderr
