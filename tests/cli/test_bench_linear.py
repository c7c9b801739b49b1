"""``bench linear`` at tiny sizes: what it prints, what it refuses, what it never claims."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
from machine_keys import MACHINE_KEYS

from ascend_plugin.bench.linear.cases import SCHEMES

ROW_KEYS = {
    "scheme",
    "m",
    "n",
    "k",
    "group",
    "implementation",
    "isa",
    "threads",
    "layers",
    "time_ms",
    "bf16_time_ms",
    "vllm_bf16_time_ms",
    "stock_time_ms",
    "best_ms",
    "bf16_best_ms",
    "ratio_vs_bf16",
    "ratio_vs_vllm_bf16",
    "ratio_vs_stock",
    "gb_per_s",
    "gflop_per_s",
    "rel_l2",
    "stock_rel_l2",
    "parity_ok",
    "pairs",
    "note",
}
META_KEYS = MACHINE_KEYS | {
    "seconds_per_case",
    "interleaving",
    "ratios",
    "ours",
    "bf16",
    "vllm_bf16",
    "stock",
    "rel_l2",
}
TINY = (
    *("bench", "linear", "--threads", "1", "--seconds", "0.05"),
    *("--shape", "96x128", "--rows", "1", "--rows", "20"),
)

#: The command line in a process whose operator is really wrong: it scales its result.
_BROKEN = """
import dataclasses
from ascend_plugin.ops import weight_quant_matmul
from ascend_plugin.cli.main import main

operator = weight_quant_matmul.operator
best, plain = operator.implementations

def load():
    right = plain.load()
    def run(x, weight, scales, zeros, bias, out, group, bits):
        right(x, weight, scales, zeros, bias, out, group, bits)
        out *= 1.1
    return run

operator.implementations = (dataclasses.replace(best, supports=plain.supports, load=load),)
main()
"""


def test_every_scheme(run_cli, tmp_path):
    done = run_cli(
        *TINY,
        *(argument for scheme in SCHEMES for argument in ("--scheme", scheme)),
        *("--plot", tmp_path / "result.svg", "--json"),
    )
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)  # nothing else was on stdout, else this fails
    assert set(result) == {"rows", "meta"}
    assert set(result["meta"]) == META_KEYS
    rows = result["rows"]
    assert [(row["scheme"], row["m"]) for row in rows] == [(s, m) for s in SCHEMES for m in (1, 20)]
    for row in rows:
        assert set(row) == ROW_KEYS
        assert row["parity_ok"] is True, row
        assert 0 < row["rel_l2"] < 5e-3
        for name in ("time_ms", "bf16_time_ms", "ratio_vs_bf16", "ratio_vs_vllm_bf16"):
            assert row[name] > 0
        alone = row["scheme"] in ("w8a16", "bf16")  # vLLM has no layer of that scheme beside bf16
        assert (row["stock_time_ms"] is None) == alone
        assert (row["ratio_vs_stock"] is None) == alone
        assert row["group"] == (128 if row["scheme"] in ("w8a8", "bf16") else 64)
    assert (tmp_path / "result.svg").read_text().lstrip().startswith("<?xml")


def test_a_table_of_odd_sizes(run_cli):
    done = run_cli(
        *("bench", "linear", "--threads", "1", "--seconds", "0.05", "--shape", "70x90"),
        *("--rows", "3", "--group", "0", "--implementation", "reference"),
    )
    assert done.returncode == 0, done.stderr
    assert "w4a16 channel 70×90, 3 rows" in done.stdout
    assert "reference" in done.stdout
    assert "multiples of 32" in done.stdout


@pytest.mark.parametrize("as_json", [True, False])
def test_a_wrong_operator_has_no_ratio(repository, as_json):
    done = subprocess.run(
        [sys.executable, "-c", _BROKEN, *TINY, *(["--json"] if as_json else [])],
        cwd=repository,
        env=os.environ,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    assert "parity failed" in done.stderr
    if not as_json:
        assert done.stdout.count("parity failed") >= 2
        return
    for row in json.loads(done.stdout)["rows"]:
        assert row["parity_ok"] is False
        for name in ("ratio_vs_bf16", "ratio_vs_vllm_bf16", "ratio_vs_stock"):
            assert row[name] is None
        assert row["time_ms"] > 0
        assert "parity failed" in row["note"]


@pytest.mark.parametrize(
    "arguments, words",
    [
        (("--scheme", "w2a16"), ("--scheme w2a16", "w4a16, w4a16-zp, w8a16, w8a8, bf16")),
        (("--shape", "big"), ("--shape big", "NxK", "smollm2, 7b")),
        (("--shape", "64x0"), ("--shape 64x0", "NxK")),
        (("--rows", "0"), ("--rows 0", "at least 1")),
        (("--shape", "64x576", "--group", "128"), ("--group 128", "k=576", "multiple of 32")),
        (("--threads", "100000"), ("--threads 100000", "Use 1 to")),
        (("--plot", "picture.pdf"), ("picture.pdf", ".png, .svg")),
    ],
)
def test_refusals_say_what_is_allowed(run_cli, arguments, words):
    done = run_cli("bench", "linear", *arguments)
    assert done.returncode == 1
    assert done.stdout == ""
    assert done.stderr.startswith("Error: ")
    assert done.stderr.count("\n") == 1
    for word in words:
        assert word in done.stderr
