"""The driver of ``quantize``: stages, interruptions, refusals; environments without a network.

The tools themselves take gigabytes and minutes to install, so a small script stands in for one; it
runs in a process of its own as a tool does. What the tools wrote is in tests/data/quantised.
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import pytest
from byte_tokenizer import write_tokenizer
from typer.testing import CliRunner

from ascend_plugin.cli.main import app
from ascend_plugin.weight_tools import WeightToolError, environments, jobs, quantize
from ascend_plugin.weight_tools.environments import CACHE_VARIABLE, ToolEnvironment

RECIPE = """
tool: llm-compressor
calibration: {tokens: 128, context: 32, chat: false}
ignore: [lm_head]
stages:
  - name: smooth
    dtype: float32
    modifiers: {SmoothQuantModifier: {}}
  - name: quantise
    modifiers: {QuantizationModifier: {scheme: W8A8}}
"""

TOOL = """
import json, shutil, sys
from pathlib import Path
job = json.loads(Path(sys.argv[1]).read_text())
with Path(__file__).with_name("ran.jsonl").open("a") as ran:
    print(json.dumps(job), file=ran)
print("@progress " + json.dumps(["half", 1, 2]), flush=True)
print("the tool says something")
name = next(iter(job["modifiers"]))
if Path(__file__).with_name("fail").exists() and name == "QuantizationModifier":
    sys.exit("out of luck")
shutil.copytree(job["model"], job["output"])
"""


@pytest.fixture(scope="module")
def model(tiny, tmp_path_factory) -> Path:
    """A float model with a tokenizer."""
    folder = tmp_path_factory.mktemp("base") / "float"
    shutil.copytree(tiny("llama"), folder)
    write_tokenizer(folder)
    return folder


@pytest.fixture
def tool(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A script that stands in for llm-compressor."""
    folder = tmp_path / "tool"
    folder.mkdir()
    (folder / "tool.py").write_text(TOOL)
    monkeypatch.setattr(jobs, "worker_script", lambda name: folder / "tool.py")
    monkeypatch.setattr(ToolEnvironment, "make", lambda self, report: Path(sys.executable))
    return folder


def run(*arguments):
    return CliRunner().invoke(app, ["quantize", *map(str, arguments)])


def ran(tool: Path) -> list[dict]:
    return [json.loads(line) for line in (tool / "ran.jsonl").read_text().splitlines()]


def test_stages_follow_each_other(model, tool, text_path, tmp_path, capfd) -> None:
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    (tmp_path / "more.txt").write_text("re:.*down_proj\n")
    output = tmp_path / "made"
    common = (model, "--recipe", tmp_path / "recipe.yaml", "--text", text_path, "-o", output)
    done = run(*common, "--ignore", tmp_path / "more.txt")
    assert done.exit_code == 0, done.exception
    first, second = ran(tool)
    assert first["model"] == str(model.resolve())
    assert second["model"].endswith("/.made.stages/1-smooth")
    assert (first["dtype"], second["dtype"]) == ("float32", "float32")
    assert second["ignore"] == ["lm_head", "re:.*down_proj"]
    about = json.loads((output / quantize.PROVENANCE_FILE).read_text())
    assert about["recipe_content"]["stages"][0]["name"] == "smooth"
    assert about["versions"]["llmcompressor"]
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        *("made", "more.txt", "recipe.yaml", "tool")
    ]
    out, err = capfd.readouterr()
    assert f"ascend-plugin inspect {output}" in out
    assert "1 of 2: quantise (2 of 2): half" in err + done.stderr
    assert "the tool says something" not in out


def test_goes_on_after_the_last_whole_stage(model, tool, text_path, tmp_path) -> None:
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    output = tmp_path / "made"
    common = (model, "--recipe", tmp_path / "recipe.yaml", "--text", text_path, "-o", output)
    (tool / "fail").touch()
    done = run(*common)
    assert done.exit_code == 1
    assert isinstance(done.exception, WeightToolError)
    for part in ("failed at quantise (2 of 2)", "out of luck", "run the same command again"):
        assert part in str(done.exception)
    assert not output.exists()
    (tool / "fail").unlink()

    # Another recipe is not mixed with what is there.
    (tmp_path / "recipe.yaml").write_text(RECIPE.replace("W8A8", "W4A16"))
    done = run(*common)
    assert "differs in recipe_digest, recipe_content. Start anew with --restart" in str(
        done.exception
    )
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    assert run(*common).exit_code == 0
    names = [next(iter(job["modifiers"])) for job in ran(tool)]
    assert names == ["SmoothQuantModifier", "QuantizationModifier", "QuantizationModifier"]
    assert output.is_dir()


def test_calibration_windows(model, tool, text_path, tmp_path) -> None:
    from safetensors.torch import load_file

    (tool / "fail").touch()  # leaves the work folder
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    run(model, "--recipe", tmp_path / "recipe.yaml", "--text", text_path, "-o", tmp_path / "made")
    work = tmp_path / ".made.stages"
    ids = load_file(work / "tokens.safetensors")["input_ids"]
    assert ids.shape == (4, 32)
    lines = [json.loads(line) for line in (work / "tokens.jsonl").read_text().splitlines()]
    assert len(lines) == 4
    assert lines[0]["inputs_pretokenized"] in text_path.read_text()


def test_refusals(model, tool, quantised, text_path, tmp_path) -> None:
    (tmp_path / "recipe.yaml").write_text(RECIPE)

    def said(*arguments) -> str:
        done = run(*arguments, "--recipe", tmp_path / "recipe.yaml")
        assert done.exit_code == 1
        assert type(done.exception).__module__.startswith("ascend_plugin."), done.exception
        return str(done.exception)

    new = tmp_path / "made"
    assert "calibrates, so it needs prose: --text FILE" in said(model, "-o", new)
    text = ("--text", text_path)
    assert "is quantised already" in said(quantised("gptq").path, "-o", new, *text)
    assert "exists; name another folder" in said(model, "-o", tmp_path, *text)
    assert "there is no folder" in said(model, "-o", tmp_path / "no" / "made", *text)
    assert "it has no config.json" in said(tmp_path, "-o", new, *text)
    assert "--format gguf is unknown" in said(model, "-o", new, *text, "--format", "gguf")
    assert not (tool / "ran.jsonl").exists()


@pytest.mark.slow
def test_an_environment_without_a_network(tmp_path, monkeypatch) -> None:
    """The error says what failed and what to do; what was done is not done again."""
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path / "cache"))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.delenv("PIP_FIND_LINKS", raising=False)
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.setattr(environments, "_PINS", tmp_path)
    (tmp_path / "some-tool.txt").write_text("# pins\ntorch==2.13.0+cpu\nsome-package==1.0\n")
    environment = ToolEnvironment.of("some-tool")
    steps: list[str] = []
    for expected in (["venv", "torch"], ["torch"]):
        steps.clear()
        with pytest.raises(WeightToolError) as caught:
            environment.make(lambda what, done, total: steps.append(what.rpartition(" ")[2]))
        assert steps == expected
    said = str(caught.value)
    for part in ("torch==2.13.0+cpu", "PIP_INDEX_URL", "goes on from here", str(environment.log)):
        assert part in said


def test_a_cache_that_cannot_be_written(tmp_path, monkeypatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path / "file"))
    with pytest.raises(WeightToolError, match=f"set {CACHE_VARIABLE} to a folder that can"):
        ToolEnvironment.of("llm-compressor").make(lambda *_: None)
