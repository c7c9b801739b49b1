"""Recipes: the project's own, and what is refused."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from real_checkpoints import FOLDER as FIXTURES
from real_checkpoints import NAMES

from ascend_plugin.weight_tools import WeightToolError
from ascend_plugin.weight_tools.environments import ToolEnvironment, tools
from ascend_plugin.weight_tools.recipe import FOLDER, load_recipe, read_ignore

GOOD = """
tool: llm-compressor
ignore: [lm_head]
stages:
  - name: quantise
    modifiers:
      QuantizationModifier: {targets: [Linear], scheme: W8A8}
"""


@pytest.mark.parametrize("path", sorted(FOLDER.glob("*.yaml")), ids=lambda path: path.stem)
def test_own_recipes(path: Path) -> None:
    """Each loads by name, says when to use it, and leaves the output embedding alone."""
    recipe = load_recipe(Path(path.stem))
    assert "lm_head" in recipe.ignore
    assert path.read_text().startswith("# ")
    assert "# When: " in path.read_text()
    assert recipe.tool in tools()


@pytest.mark.parametrize("name", NAMES)
def test_recipes_of_committed_checkpoints(name: str) -> None:
    assert load_recipe(FIXTURES / "recipes" / f"{name}.yaml").stages
    assert (FIXTURES / name / "config.json").is_file()


@pytest.mark.parametrize("tool", tools())
def test_environments_are_pinned(tool: str) -> None:
    """Every line is a version; torch is the CPU build of the plugin's own."""
    from ascend_plugin.versions import tested_versions

    versions = ToolEnvironment.of(tool).versions()
    assert versions["torch"] == f"{tested_versions()['torch']}+cpu"
    assert all(re.fullmatch(r"[0-9][\w.+!]*", version) for version in versions.values())


def write(folder: Path, text: str) -> Path:
    path = folder / "recipe.yaml"
    path.write_text(text)
    return path


def test_ignore_lists_join(tmp_path: Path) -> None:
    path = write(tmp_path, GOOD.replace("ignore:", "ignore_file: more.txt\nignore:"))
    (tmp_path / "more.txt").write_text("# guarded\nre:.*down_proj  # outliers\n\nlm_head\n")
    other = tmp_path / "sensitive.json"
    other.write_text('{"ignore": ["model.layers.0.mlp.up_proj"]}')
    recipe = load_recipe(path, [other])
    assert recipe.ignore == ("lm_head", "re:.*down_proj", "model.layers.0.mlp.up_proj")
    assert recipe.digest != load_recipe(path).digest


def test_what_is_refused(tmp_path: Path) -> None:
    def said(text: str) -> str:
        with pytest.raises(WeightToolError) as caught:
            load_recipe(write(tmp_path, text))
        return str(caught.value)

    assert "tool: Input should be 'llm-compressor'" in said(GOOD.replace("llm-compressor", "quip"))
    assert "stage 'quantise' of msmodelslim needs 'config' alone" in said(
        GOOD.replace("llm-compressor", "msmodelslim")
    )
    assert "stages.0.modifier: Extra inputs" in said(GOOD.replace("modifiers:", "modifier:"))
    assert "is no YAML" in said("stages: [")
    twice = GOOD + GOOD[GOOD.index("  - name") :]
    assert "stages need names of their own, not quantise, quantise" in said(twice)
    with pytest.raises(WeightToolError, match=r"Give a file, or one of .*w8a8-rtn"):
        load_recipe(Path("no-such-recipe"))
    with pytest.raises(WeightToolError, match="tool 'quip' is unknown; use one of auto-round"):
        ToolEnvironment.of("quip")
    broken = tmp_path / "list.json"
    broken.write_text('{"modules": []}')
    with pytest.raises(WeightToolError, match="an object with such a list under 'ignore'"):
        read_ignore(broken)
