"""``mtp train``, ``attach`` and ``eval`` as a user runs them."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest
from machine_keys import MACHINE_KEYS
from typer.testing import CliRunner

from ascend_plugin.cli.main import app
from ascend_plugin.spec_decode.token_order import FILE, load_order


def run(*arguments):
    """Run the command line in this process: torch and transformers are loaded already."""
    return CliRunner().invoke(app, ["mtp", *map(str, arguments)])


def refusal(*arguments) -> str:
    done = run(*arguments)
    assert done.exit_code == 1
    assert type(done.exception).__module__.startswith("ascend_plugin."), done.exception
    assert done.stdout == ""
    return str(done.exception)


@pytest.fixture(scope="session")
def text_path(tmp_path_factory) -> Path:
    from mtp_text import TEXT

    path = tmp_path_factory.mktemp("text") / "prose.txt"
    path.write_text(TEXT)
    return path


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--answers", 0), "--answers 0 is not possible; it must be at least 1"),
        (("--prose", 1.5), r"--prose 1.5 is not possible; it is a share from 0 to 1"),
        (("--minutes", 0), r"--minutes 0.0 is not possible; it must be more than 0"),
        (("--plot", "curve.gif"), "--plot curve.gif must end in one of .png, .svg"),
    ],
)
def test_bad_options(base_path, text_path, tmp_path, options, message) -> None:
    found = refusal("train", base_path, "--data", text_path, "-o", tmp_path / "out", *options)
    assert message in found
    assert list(tmp_path.iterdir()) == []


def test_missing_files(base_path, text_path, tmp_path) -> None:
    nothing = tmp_path / "nothing"
    assert "cannot be read" in refusal("train", base_path, "--data", nothing, "-o", tmp_path / "o")
    assert "is not a model" in refusal("train", nothing, "--data", text_path, "-o", tmp_path / "o")
    joined = ("attach", base_path, nothing, "-o", tmp_path / "o")
    assert "cannot be read as a draft layer" in refusal(*joined)
    begun = ("train", base_path, "--data", text_path, "-o", tmp_path / "o", "--start-from", nothing)
    assert "cannot be read as a draft layer" in refusal(*begun)
    assert list(tmp_path.iterdir()) == []


def test_a_model_without_a_layer_is_not_evaluated(base_path) -> None:
    assert "has no MTP layer. Train one with" in refusal("eval", base_path)


def test_prompts_that_cannot_be_read(base_path, tmp_path) -> None:
    config = json.loads((base_path / "config.json").read_text()) | {"num_nextn_predict_layers": 1}
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    assert "there is no prompts.jsonl in" in refusal("eval", folder)
    file = tmp_path / "prompts"
    file.write_text("[]\n")
    assert "cannot be read" in refusal("eval", folder, "--prompts", file)
    file.write_text("\n")
    assert "is empty" in refusal("eval", folder, "--prompts", file)


def test_a_head_from_text(base_path, text_path, tmp_path) -> None:
    from transformers import AutoTokenizer

    file = tmp_path / "heads" / "head.safetensors"
    done = run("head", base_path, "--text", text_path, "-o", file)
    assert done.exit_code == 0, done.exception
    assert f'"file": "{file}"' in done.stdout
    found = load_order(file)
    tokenizer = AutoTokenizer.from_pretrained(base_path)
    added = len(tokenizer.get_added_vocab())
    counts = Counter(tokenizer(text_path.read_text(), add_special_tokens=False)["input_ids"])
    ranked = [counts[token] for token in found.tokens.tolist()[added:]]
    assert ranked == sorted(counts.values(), reverse=True)
    assert set(found.tokens.tolist()) == {*counts, *tokenizer.get_added_vocab().values()}
    inside = ("head", base_path, "--text", text_path, "-o", base_path / "head.safetensors")
    assert "outside of a checkpoint's folder" in refusal(*inside)
    assert "cannot be read" in refusal("head", base_path, "--text", "/none", "-o", file)
    assert "is not a model" in refusal("head", tmp_path, "--text", text_path, "-o", file)


@pytest.mark.engine
@pytest.mark.slow
def test_from_text_to_speed(base_path, text_path, tmp_path, capfd) -> None:
    """Sample, read, train, write, serve; and again, which finds everything done."""
    output = tmp_path / "trained"
    arguments = ("train", base_path, "--data", text_path, "-o", output, "--json")
    arguments += ("--answers", 24, "--held-out", 8, "--answer-tokens", 24, "--text-tokens", 2000)
    arguments += ("--epochs", 2, "--batch-tokens", 512, "--threads", 1)
    done = run(*arguments, "--plot", tmp_path / "curve.png")
    assert done.exit_code == 0, done.exception
    told = json.loads(capfd.readouterr().out)
    (row,) = told["rows"]
    assert told["meta"].keys() >= MACHINE_KEYS | {"samples", "training"}
    assert row["held_out"] == 8
    assert row["learnt"] >= 24
    assert 0.9 < row["coverage"] <= 1.0
    assert len(row["points"][-1]["acceptance"]) == 3
    assert (tmp_path / "curve.png").stat().st_size > 1000
    order = load_order(output / "checkpoint" / FILE).tokens.tolist()
    assert order == load_order(output / "layer.safetensors").tokens.tolist()
    assert 0 < len(order) <= 256
    again = run(*arguments)
    assert again.exit_code == 0, again.exception
    assert json.loads(capfd.readouterr().out)["rows"] == told["rows"]
    assert "differs in samples" in refusal(*arguments, "--seed", 5)
    layer = output / "layer.safetensors"
    assert "differs in start" in refusal(*arguments, "--start-from", layer)
    options = ("--drafts", 2, "--tokens", 20, "--rounds", 1, "--threads", 1, "--json")
    measured = run("eval", output / "checkpoint", "--speed-prompts", 8, *options)
    assert measured.exit_code == 0, measured.exception
    told = json.loads(capfd.readouterr().out)
    (found,) = told["rows"]
    speculation = told["meta"]["speculation"]
    assert speculation["adaptive"] is True
    assert len(order) <= speculation["draft_head"] <= len(order) + 1
    assert len(speculation["steps"]) == 3
    assert sum(speculation["steps"]) > 20
    assert found["proposals"] > 0
    assert 0 <= found["acceptance_first"] <= 1
    assert found["mean_accepted_length"] == pytest.approx(1 + sum(found["acceptance"]), abs=0.01)
    assert found["speedup_b1"] > 0
    assert found["speedup_b8"] > 0
