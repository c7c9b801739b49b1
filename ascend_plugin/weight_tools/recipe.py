"""Recipes: which tool, what it reads, and what it does in which order.

A recipe is a YAML file; ``configs/quant`` has those of the project. What stands inside a stage are
the tool's own words, so the tool's documentation applies.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from ascend_plugin.weight_tools.errors import WeightToolError

FOLDER = Path(__file__).resolve().parents[1] / "configs" / "quant"


class Calibration(BaseModel):
    """What the model reads while it is calibrated.

    Attributes:
        tokens: how many, spread over the texts.
        context: how many at once.
        chat: put every fourth window into the form of the chat template; None: if there is one.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    tokens: Annotated[int, Field(ge=1)] = 65536
    context: Annotated[int, Field(ge=2)] = 1024
    chat: bool | None = None


class Stage(BaseModel):
    """One step, whose result is a whole checkpoint: where an interrupted run goes on.

    Attributes:
        name: of the step.
        dtype: what the tool computes and saves in; ``auto``: the model's own.
        modifiers: llm-compressor: arguments by modifier, in this order.
        config: msmodelslim: its configuration.
        arguments: gptqmodel and auto-round: arguments of their quantiser.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: Annotated[str, Field(pattern=r"[a-z0-9-]+")]
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    modifiers: dict[str, dict[str, Any] | None] | None = None
    config: dict[str, Any] | None = None
    arguments: dict[str, Any] | None = None


#: Which key of a stage belongs to which tool.
_KEYS = {
    "llm-compressor": "modifiers",
    "msmodelslim": "config",
    "gptqmodel": "arguments",
    "auto-round": "arguments",
}


class Recipe(BaseModel):
    """A recipe.

    Attributes:
        tool: that runs it.
        calibration: what it reads; None: it needs no text.
        ignore: modules that stay float, by name or, after ``re:``, by pattern.
        ignore_file: a file with more of them, one in a line; beside the recipe if relative.
        stages: in this order.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    tool: Literal["llm-compressor", "msmodelslim", "gptqmodel", "auto-round"]
    calibration: Calibration | None = None
    ignore: tuple[str, ...] = ()
    ignore_file: Path | None = None
    stages: Annotated[tuple[Stage, ...], Field(min_length=1)]

    @model_validator(mode="after")
    def _keys_of_the_tool(self) -> Recipe:
        wanted = _KEYS[self.tool]
        for stage in self.stages:
            given = [
                key for key in dict.fromkeys(_KEYS.values()) if getattr(stage, key) is not None
            ]
            if given != [wanted]:
                raise ValueError(f"stage {stage.name!r} of {self.tool} needs {wanted!r} alone")
        names = [stage.name for stage in self.stages]
        if len(set(names)) != len(names):
            raise ValueError(f"stages need names of their own, not {', '.join(names)}")
        return self

    @property
    def digest(self) -> str:
        """SHA-256 of everything that it says."""
        return hashlib.sha256(json.dumps(self.model_dump(mode="json")).encode()).hexdigest()


def load_recipe(path: Path, ignore_files: Sequence[Path] = ()) -> Recipe:
    """Read a recipe, with the modules that stay float all in ``ignore``.

    Args:
        path: of the recipe; a bare name is looked for in ``configs/quant`` too.
        ignore_files: further lists of modules.

    Raises:
        WeightToolError: a file is missing, or says something that is not allowed.
    """
    known = FOLDER / f"{path}.yaml"
    found = known if not path.is_file() and len(path.parts) == 1 and known.is_file() else path
    try:
        content = yaml.safe_load(found.read_text(encoding="utf-8"))
        recipe = Recipe.model_validate(content)
    except OSError as error:
        names = ", ".join(sorted(file.stem for file in FOLDER.glob("*.yaml")))
        raise WeightToolError(
            f"--recipe {path} cannot be read ({error.strerror}). Give a file, or one of {names}."
        ) from error
    except yaml.YAMLError as error:
        raise WeightToolError(f"--recipe {path} is no YAML: {error}.") from error
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"]) or "recipe"
        raise WeightToolError(f"--recipe {path}: {where}: {first['msg']}.") from error
    files = [*ignore_files]
    if recipe.ignore_file is not None:
        files.insert(0, found.parent / recipe.ignore_file)
    ignored = [*recipe.ignore, *(name for file in files for name in read_ignore(file))]
    unique = tuple(dict.fromkeys(ignored))
    return recipe.model_copy(update={"ignore": unique, "ignore_file": None})


def read_ignore(path: Path) -> list[str]:
    """Read modules that stay float: one in a line, ``#`` begins a remark; or a JSON list.

    Raises:
        WeightToolError: the file cannot be read, or is something else.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise WeightToolError(
            f"the list of modules {path} cannot be read ({error}). Give a text file with a name "
            "or a pattern (re:…) in each line."
        ) from error
    if text.lstrip().startswith(("[", "{")):
        return _read_json(path, text)
    lines = (line.partition("#")[0].strip() for line in text.splitlines())
    return [line for line in lines if line]


def _read_json(path: Path, text: str) -> list[str]:
    try:
        content = json.loads(text)
    except ValueError as error:
        raise WeightToolError(f"the list of modules {path} is no JSON: {error}.") from error
    names = content.get("ignore") if isinstance(content, dict) else content
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise WeightToolError(
            f"the list of modules {path} must be a JSON list of names, or an object with such a "
            "list under 'ignore'."
        )
    return names
