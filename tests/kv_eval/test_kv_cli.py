"""``calibrate kv`` and ``eval kv`` as a user runs them."""

from __future__ import annotations

import json

import pytest
from machine_keys import MACHINE_KEYS
from typer.testing import CliRunner

from ascend_plugin.cli.main import app
from ascend_plugin.kv_cache.scales import load_kv_scales
from ascend_plugin.kv_eval import synthetic


def run(*arguments):
    """Run the command line in this process: torch and transformers are loaded already."""
    return CliRunner().invoke(app, list(map(str, arguments)))


def output_of(capfd, *arguments) -> tuple[str, str]:
    """Run in this process and return what went to stdout and stderr."""
    done = run(*arguments)
    assert done.exit_code == 0, done.exception
    out, err = capfd.readouterr()  # file descriptors: results bypass sys.stdout
    return out, err + done.stderr


def refusal(*arguments) -> str:
    done = run(*arguments)
    assert done.exit_code == 1
    assert type(done.exception).__module__.startswith("ascend_plugin."), done.exception
    assert done.stdout == ""
    message = str(done.exception)
    assert "\n" not in message
    return message


def small(model_path, text_path):
    return (model_path, "--text", text_path, "--context", "160")


def test_calibrate_then_evaluate(run_cli, capfd, model_path, text_path, tmp_path):
    scales, picture = tmp_path / "scales.safetensors", tmp_path / "layers.svg"
    common = small(model_path, text_path)
    done = run_cli("calibrate", "kv", *common, "--tokens", "320", "-o", scales, "--json")
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert set(result) == {"rows", "meta"}
    assert set(result["rows"][0]) == {
        *("layer", "kv_heads", "head_dim", "k_absmax", "v_absmax", "k_error", "v_error")
    }
    assert MACHINE_KEYS | {"model", "tokens", "text_sha256"} <= set(result["meta"])
    assert "largest values" in done.stderr
    assert "mean errors" in done.stderr
    assert len(load_kv_scales(scales)[0]) == 2

    out, _ = output_of(
        *(capfd, "eval", "kv", *common, "--tokens", "320", "--scales", scales),
        *("--variants", "c8d,c8s", "--variants", "c8p", "--plot", picture, "--json"),
    )
    result = json.loads(out)
    assert [row["variant"] for row in result["rows"]] == ["bf16", "c8d", "c8s", "c8p-int4"]
    meta = result["meta"]
    assert MACHINE_KEYS | {"model", "dtype", "windows_sha256", "implementations"} <= set(meta)
    assert meta["scales"]["model"] == "tiny"
    assert len(meta["layers"]) == 2 * 4
    assert set(meta["layers"][0]) > {"attn_rel_l2", "eps_k", "position0_outlier_share_v"}
    assert picture.read_text().startswith("<?xml")


def test_tables(capfd, model_path, text_path, tmp_path):
    common = small(model_path, text_path)
    out, _ = output_of(capfd, "calibrate", "kv", *common, "--tokens", "160", "-o", tmp_path / "s")
    assert "error of K" in out
    assert f"{tmp_path / 's'} holds the scales of 2 layers." in out
    out, _ = output_of(capfd, "eval", "kv", *common, "--tokens", "160")
    assert [line.split()[0] for line in out.splitlines()[2:]] == ["bf16", "c8d"]


@pytest.mark.parametrize("as_json", [True, False])
def test_synthetic(capfd, monkeypatch, as_json):
    monkeypatch.setattr(synthetic, "TOKENS", 128)
    options = ["--json"] if as_json else []
    out, _ = output_of(capfd, "eval", "kv-synthetic", "--rounds", "1", *options)
    cases = [case.name for case in synthetic.CASES]
    if as_json:
        result = json.loads(out)
        assert list(result["meta"]["cases"]) == cases
        assert len(result["rows"]) == 5 * len(cases)
    else:
        assert all(case in out for case in cases)


def test_a_short_calibration_text_is_told(capfd, model_path, text_path, tmp_path):
    short = tmp_path / "short.txt"
    short.write_text(text_path.read_text()[:400])
    options = ("--tokens", "9000", "-o", tmp_path / "s")
    _, err = output_of(capfd, "calibrate", "kv", *small(model_path, short), *options)
    assert "the text has 320 tokens in whole windows, not 9000" in err


def test_restart_forgets_a_foreign_state(model_path, text_path, tmp_path):
    common = ("calibrate", "kv", *small(model_path, text_path), "--tokens", "160")
    (tmp_path / ".s.state").write_bytes(b"foreign")
    assert "--restart" in refusal(*common, "-o", tmp_path / "s")
    done = run(*common, "-o", tmp_path / "s", "--restart")
    assert done.exit_code == 0, done.exception
    assert [path.name for path in tmp_path.iterdir()] == ["s"]


@pytest.mark.parametrize(
    "arguments, words",
    [
        (("--tokens", "0"), ("--tokens 0", "at least 1")),
        (("--tokens", "99999"), ("--tokens 99999", "windows")),
        (("--context", "5000"), ("--context 5000", "2 to 4096")),
        (("--variants", "c9"), ("--variants c9", "c8d")),
        (("--variants", "c8s"), ("--scales",)),
        (("--scales", "no/such/file"), ("no/such/file", "not a file")),
        (("--threshold", "-1"), ("--threshold -1", ">= 0")),
        (("--threads", "9999"), ("--threads 9999", "Use 1 to")),
        (("--dtype", "int8"), ("--dtype int8", "bfloat16")),
        (("--plot", "x.pdf"), ("x.pdf", ".png, .svg")),
        (("--text", "no-such.txt"), ("no-such.txt", "cannot be read")),
    ],
)
def test_refusals_of_eval(model_path, text_path, arguments, words):
    message = refusal("eval", "kv", *small(model_path, text_path), "--tokens", "160", *arguments)
    for word in words:
        assert word in message


def test_refusals_of_calibrate(model_path, text_path, tmp_path):
    common = small(model_path, text_path)
    assert "no folder" in refusal("calibrate", "kv", *common, "-o", tmp_path / "no" / "s")
    message = refusal("calibrate", "kv", tmp_path, "--text", text_path, "-o", tmp_path / "s")
    assert "no config.json" in message
    message = refusal("calibrate", "kv", *common, "-o", tmp_path / "s", "--tokens", "-3")
    assert "at least 1" in message
    empty = tmp_path / "empty.txt"
    empty.write_text("\n")
    message = refusal("calibrate", "kv", model_path, "--text", empty, "-o", tmp_path / "s")
    assert "is empty" in message
