"""``bench attention`` at tiny sizes: what it prints, what it refuses, what it never claims."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
from machine_keys import MACHINE_KEYS

from ascend_plugin.bench.attention.cases import VARIANTS

ROW_KEYS = {
    "phase",
    "variant",
    "implementation",
    "isa",
    "batch",
    "context",
    "new_tokens",
    "heads",
    "kv_heads",
    "head_dim",
    "block_size",
    "threads",
    "time_ms",
    "stock_time_ms",
    "best_ms",
    "stock_best_ms",
    "ratio_vs_stock",
    "gb_per_s",
    "read_gb_per_s",
    "gflop_per_s",
    "rel_l2_vs_fp64",
    "rel_l2_vs_pages",
    "stock_rel_l2_vs_fp64",
    "parity_ok",
    "kv_tokens_per_gib",
    "kv_tokens_vs_bf16",
    "pairs",
    "note",
}
META_KEYS = MACHINE_KEYS | {
    "our_cache",
    "our_call",
    "stock_cache",
    "interleaving",
    "ratio_vs_stock",
    "seconds_per_case",
    "stock_rel_l2_vs_fp64",
    "rel_l2_vs_pages",
    "int8_data",
    "gb_per_s",
    "read_gb_per_s",
    "ld_preload",
}
TINY = (
    *("bench", "attention", "--threads", "1", "--seconds", "0.05", "--batch", "2"),
    *("--context", "96", "--new-tokens", "40", "--heads", "4", "--kv-heads", "2"),
    *("--head-dim", "32"),
)

#: The command line in a process whose operators are really wrong: attention scales its output,
#: and the write forgets the last token.
_BROKEN = """
import dataclasses
from ascend_plugin.ops import kv_cache_write, paged_attention
from ascend_plugin.cli.main import main

def break_operator(operator, wrong):
    best = operator.implementations[0]
    operator.implementations = (
        dataclasses.replace(best, supports=operator.implementations[-1].supports, bind=wrong),
    )

bind_attention = paged_attention.operator.implementations[-1].bind
bind_write = kv_cache_write.operator.implementations[-1].bind

def attention(pages, layout):
    right = bind_attention(pages, layout)
    def run(query, pages, out, *rest, **options):
        right(query, pages, out, *rest, **options)
        out *= 1.1
    return run

def write(pages, layout):
    right = bind_write(pages, layout)
    return lambda key, value, pages, slots: right(key[:-1], value[:-1], pages, slots[:-1])

break_operator(paged_attention.operator, attention)
break_operator(kv_cache_write.operator, write)
main()
"""


def _result(done):
    return json.loads(done.stdout)


def test_every_phase_and_variant(run_cli, tmp_path):
    done = run_cli(
        *TINY,
        *("--block-size", "32"),
        *(argument for variant in VARIANTS for argument in ("--variant", variant)),
        *("--plot", tmp_path / "result.svg", "--json"),
    )
    assert done.returncode == 0, done.stderr
    result = _result(done)  # nothing else was on stdout, else this fails
    assert set(result) == {"rows", "meta"}
    assert set(result["meta"]) == META_KEYS
    assert result["meta"]["threads"] == 1
    rows = result["rows"]
    assert [(row["phase"], row["variant"]) for row in rows] == [
        (phase, variant) for phase in ("decode", "prefill", "write") for variant in VARIANTS
    ]
    for row in rows:
        assert set(row) == ROW_KEYS
        assert row["parity_ok"] is True, row
        assert row["time_ms"] > 0
        assert row["stock_time_ms"] > 0
        assert row["ratio_vs_stock"] > 0
        assert row["note"] is None
        assert (row["isa"] is None) == (row["implementation"] == "reference")
    assert (tmp_path / "result.svg").read_text().lstrip().startswith("<?xml")


def test_what_vllm_does_not_run_has_a_note_and_no_ratio(run_cli):
    done = run_cli(
        *TINY, "--block-size", "16", "--phase", "decode", "--implementation", "reference", "--json"
    )
    assert done.returncode == 0, done.stderr
    (row,) = _result(done)["rows"]
    assert (row["stock_time_ms"], row["ratio_vs_stock"]) == (None, None)
    assert row["stock_rel_l2_vs_fp64"] is None
    assert "multiples of 32, not 16" in row["note"]
    assert row["implementation"] == "reference"
    assert row["parity_ok"] is True


@pytest.mark.parametrize("as_json", [True, False])
def test_a_wrong_operator_has_no_ratio(repository, as_json):
    arguments = [*TINY, "--block-size", "32", *(["--json"] if as_json else [])]
    done = subprocess.run(
        [sys.executable, "-c", _BROKEN, *arguments],
        cwd=repository,
        env=os.environ,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    assert "parity failed" in done.stderr
    if not as_json:
        assert done.stdout.count("parity failed") >= 3
        assert "×[" not in done.stdout
        return
    for row in _result(done)["rows"]:
        assert row["parity_ok"] is False
        assert row["ratio_vs_stock"] is None
        assert row["time_ms"] > 0
        assert row["stock_time_ms"] > 0
        assert "parity failed" in row["note"]


@pytest.mark.parametrize(
    "arguments, words",
    [
        (("--phase", "train"), ("--phase train", "decode, prefill, write")),
        (("--variant", "int4"), ("--variant int4", "bf16, fp16, fp32")),
        (("--context", "-1"), ("--context -1", "at least 1")),
        (("--heads", "7", "--kv-heads", "2"), ("--heads 7", "--kv-heads 2", "multiple")),
        (
            ("--phase", "prefill", "--context", "8", "--new-tokens", "9"),
            ("--new-tokens 9 exceeds --context 8",),
        ),
        (("--threads", "100000"), ("--threads 100000", "Use 1 to")),
        (("--seconds", "0"), ("--seconds 0", "above 0")),
        (("--isa", "avx2", "--implementation", "reference"), ("--isa avx2", "Leave one")),
        (("--plot", "picture.pdf"), ("picture.pdf", ".png, .svg")),
        (("--plot", "no/such/folder/x.png"), ("no/such/folder", "Make it")),
    ],
)
def test_refusals_say_what_is_allowed(run_cli, arguments, words):
    done = run_cli("bench", "attention", *arguments)
    assert done.returncode == 1
    assert done.stdout == ""
    assert done.stderr.startswith("Error: ")
    assert done.stderr.count("\n") == 1
    for word in words:
        assert word in done.stderr
