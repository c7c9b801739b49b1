"""``eval weights`` as a user runs it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from byte_tokenizer import write_tokenizer
from machine_keys import MACHINE_KEYS
from quant_checkpoints import QuantisedModels
from typer.testing import CliRunner

from ascend_plugin.cli.main import app

CHECKPOINTS = ("modelslim-w8a16", "compressed-w8a8-dynamic", "compressed-w4a16-group")


@pytest.fixture(scope="module")
def base(tiny, tmp_path_factory) -> Path:
    """The float model, with a tokenizer."""
    folder = tmp_path_factory.mktemp("base") / "float"
    shutil.copytree(tiny("llama"), folder)
    write_tokenizer(folder)
    return folder


def run(*arguments):
    return CliRunner().invoke(app, ["eval", "weights", *map(str, arguments)])


def refusal(*arguments) -> str:
    done = run(*arguments)
    assert done.exit_code == 1
    assert type(done.exception).__module__.startswith("ascend_plugin."), done.exception
    return str(done.exception)


def test_rows_and_picture(
    base: Path, quantised: QuantisedModels, text_path: Path, capfd, tmp_path: Path
) -> None:
    paths = [quantised(name).path for name in CHECKPOINTS]
    picture = tmp_path / "weights.svg"
    options = ("--text", text_path, "--tokens", 480, "--context", 160)
    done = run(base, *paths, *options, "--json", "--plot", picture)
    assert done.exit_code == 0, done.exception
    result = json.loads(capfd.readouterr().out)
    assert set(result) == {"rows", "meta"}
    assert MACHINE_KEYS | {"model", "tokens", "text_sha256", "layers"} <= set(result["meta"])
    first, *rows = result["rows"]
    assert (first["model"], first["scheme"], first["kl_mean"]) == ("float", "FLOAT", 0)
    assert [row["model"] for row in rows] == list(CHECKPOINTS)
    assert [row["scheme"] for row in rows] == ["W8A16", "W8A8_DYNAMIC", "W4A16"]
    eight, inputs, four = rows
    assert 0 < eight["kl_mean"] < inputs["kl_mean"] < four["kl_mean"]
    assert 0 < eight["layer_error"] < inputs["layer_error"] < four["layer_error"] < 0.5
    assert eight["top1_agreement"] > four["top1_agreement"] > 0.3
    assert four["bytes"] < eight["bytes"] < first["bytes"]
    assert four["bits_per_weight"] == pytest.approx(4.5, abs=0.1)  # a bf16 scale per 32 codes
    assert {row["tokens"] for row in result["rows"]} == {480}
    layers = [row["layer"] for row in result["meta"]["layers"] if row["model"] == CHECKPOINTS[0]]
    assert layers == [0, 1]
    assert picture.read_text().startswith("<?xml")


def test_table(base: Path, quantised: QuantisedModels, text_path: Path, capfd) -> None:
    path = quantised("gptq").path
    done = run(base, path, "--text", text_path, "--tokens", 160, "--context", 160)
    assert done.exit_code == 0, done.exception
    out, err = capfd.readouterr()
    assert "bits/weight" in out
    assert "gptq" in out
    assert "window 1" in err + done.stderr


def test_refusals(base: Path, quantised: QuantisedModels, text_path: Path, tmp_path: Path) -> None:
    path = quantised("gptq").path
    common = ("--text", text_path, "--tokens", 160, "--context", 160)
    assert "name the float model, then checkpoints" in refusal(base, *common)
    assert "is quantised; name the float model first" in refusal(path, base, *common)
    assert "is not quantised in a way that is read here" in refusal(base, base, *common)
    assert "it has no config.json" in refusal(base, tmp_path / "nothing", *common)
    assert "--context 5000 is not possible" in refusal(
        base, path, "--text", text_path, "--context", 5000
    )
    assert "--tokens 0 is not possible" in refusal(base, path, *common[:2], "--tokens", 0)
