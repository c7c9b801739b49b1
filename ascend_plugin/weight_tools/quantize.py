"""From a model and a recipe to a quantised checkpoint, stage by stage.

Every stage is a process in the tool's environment and leaves a whole checkpoint, under its final
name only when it is complete. So a run that was interrupted repeats no stage that was done.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ascend_plugin.weight_tools import jobs
from ascend_plugin.weight_tools.convert import FORMATS, convert_checkpoint
from ascend_plugin.weight_tools.environments import Progress, ToolEnvironment
from ascend_plugin.weight_tools.errors import WeightToolError
from ascend_plugin.weight_tools.recipe import Calibration, Recipe, Stage

#: What a checkpoint remembers of its making.
PROVENANCE_FILE = "ascend_plugin_quantised.json"

#: What each tool writes by itself.
NATIVE_FORMATS = {
    "llm-compressor": "compressed-tensors",
    "msmodelslim": "modelslim",
    "gptqmodel": "gptq",
    "auto-round": "auto-round",
}

_IDENTITY_FILE = "identity.json"
_TOKENS_FILE = "tokens.safetensors"


@dataclass(frozen=True, slots=True)
class QuantiseRequest:
    """What is to be made; names as in the options of ``quantize``."""

    model: Path
    recipe: Recipe
    recipe_name: str
    texts: Sequence[str]
    output: Path
    format: str | None
    restart: bool


def quantise(request: QuantiseRequest, report: Progress) -> dict[str, Any]:
    """Make the checkpoint.

    Args:
        request: what to make.
        report: told of each step.

    Returns:
        What the checkpoint remembers of its making.

    Raises:
        WeightToolError: it cannot be made.
        KVEvalError: the texts are too short.
    """
    _check(request)
    environment = ToolEnvironment.of(request.recipe.tool)
    python = environment.make(report)
    work = _Work(request.output)
    if request.restart:
        work.remove()
    identity = _identity(request, environment)
    windows = work.begin(identity, request)
    current = request.model
    count = len(request.recipe.stages)
    for i, stage in enumerate(request.recipe.stages):
        folder = work.stage_folder(i, stage)
        if not folder.is_dir():
            # What the last stage computes in is what the checkpoint is served in.
            job = _job(request, stage, current, work, windows)
            title = f"{stage.name} ({i + 1} of {count})"
            jobs.run_worker(request.recipe.tool, python, job, work.folder, title, report)
            _finish_stage(Path(job["output"]), request.model, folder)
        current = folder
    provenance = identity | {"versions": _tool_versions(environment)}
    if request.format not in (None, NATIVE_FORMATS[request.recipe.tool]):
        report(f"converting to {request.format}", 0, 1)
        converted = work.folder / "converted"
        shutil.rmtree(converted, ignore_errors=True)
        convert_checkpoint(current, converted, request.format, report)
        current = converted
    (current / PROVENANCE_FILE).write_text(json.dumps(provenance, indent=2) + "\n")
    current.rename(request.output)
    work.remove()
    return provenance


def _check(request: QuantiseRequest) -> None:
    if request.format is not None and request.format not in FORMATS:
        raise WeightToolError(
            f"--format {request.format} is unknown; use one of {', '.join(FORMATS)}."
        )
    if not (request.model / "config.json").is_file():
        raise WeightToolError(
            f"{request.model} is not a model: it has no config.json. Give the folder of a Hugging "
            "Face checkpoint; 'ascend-plugin model smollm2 DIR' makes one."
        )
    if "quantization_config" in json.loads((request.model / "config.json").read_text()):
        raise WeightToolError(
            f"{request.model} is quantised already; give the float model that it was made from."
        )
    if request.output.exists():
        raise WeightToolError(f"-o {request.output} exists; name another folder, or remove it.")
    if not request.output.absolute().parent.is_dir():
        parent = request.output.absolute().parent
        raise WeightToolError(f"-o {request.output}: there is no folder {parent}. Make it first.")
    if request.recipe.calibration and not request.texts:
        raise WeightToolError(
            f"the recipe {request.recipe_name} calibrates, so it needs prose: --text FILE."
        )


def _identity(request: QuantiseRequest, environment: ToolEnvironment) -> dict[str, Any]:
    """Return what must be the same for an interrupted run to go on."""
    from ascend_plugin.kv_eval.model import model_digest
    from ascend_plugin.kv_eval.text import text_digest

    return {
        "model": request.model.resolve().name,
        "model_digest": model_digest(request.model),
        "recipe": request.recipe_name,
        "recipe_digest": request.recipe.digest,
        "recipe_content": request.recipe.model_dump(mode="json", exclude_none=True),
        "text_sha256": text_digest(request.texts),
        "environment": environment.folder.name,
    }


def _tool_versions(environment: ToolEnvironment) -> dict[str, str]:
    wanted = (
        "llmcompressor",
        "compressed-tensors",
        "msmodelslim",
        "gptqmodel",
        "auto-round",
        "transformers",
        "torch",
    )
    found = {name.lower(): version for name, version in environment.versions().items()}
    return {name: found[name] for name in wanted if name in found}


class _Work:
    """The folder beside the output that holds stages until all is done.

    Attributes:
        folder: itself.
    """

    def __init__(self, output: Path) -> None:
        self.folder = output.absolute().with_name(f".{output.name}.stages")

    def begin(self, identity: dict[str, Any], request: QuantiseRequest) -> Path | None:
        """Go on, or start; return the file with calibration tokens.

        Raises:
            WeightToolError: what lies there is of something else.
        """
        known = self.folder / _IDENTITY_FILE
        tokens = self.folder / _TOKENS_FILE
        if known.is_file():
            found = json.loads(known.read_text())
            differing = [name for name, value in identity.items() if found.get(name) != value]
            if differing:
                raise WeightToolError(
                    f"{self.folder} was left by an interrupted run that differs in "
                    f"{', '.join(differing)}. Start anew with --restart, or name another -o."
                )
        else:
            self.folder.mkdir(exist_ok=True)
            if request.recipe.calibration:
                _write_tokens(tokens, request, request.recipe.calibration)
            known.write_text(json.dumps(identity, indent=2) + "\n")
        return tokens if request.recipe.calibration else None

    def stage_folder(self, index: int, stage: Stage) -> Path:
        """Return where a stage's result lies when it is whole."""
        return self.folder / f"{index + 1}-{stage.name}"

    def remove(self) -> None:
        """Forget everything."""
        shutil.rmtree(self.folder, ignore_errors=True)


def _write_tokens(path: Path, request: QuantiseRequest, calibration: Calibration) -> None:
    """Write the windows that the model reads, int64 ``[windows, context]``, and their text."""
    from safetensors.torch import save_file
    from transformers import AutoTokenizer

    from ascend_plugin.kv_eval.text import calibration_windows

    tokenizer = AutoTokenizer.from_pretrained(request.model, local_files_only=True)
    windows = calibration_windows(
        request.texts, tokenizer, calibration.context, calibration.tokens, calibration.chat
    )
    ids = windows.ids[:, :-1].contiguous()
    texts = [{"inputs_pretokenized": text} for text in tokenizer.batch_decode(ids)]
    lines = (json.dumps(line, ensure_ascii=False) for line in texts)
    path.with_suffix(".jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    save_file({"input_ids": ids}, path)


def _job(
    request: QuantiseRequest, stage: Stage, model: Path, work: _Work, tokens: Path | None
) -> dict[str, Any]:
    output = work.folder / f"{stage.name}.partial"
    shutil.rmtree(output, ignore_errors=True)
    return {
        "model": str(model.resolve()),
        "output": str(output),
        "tokens": str(tokens) if tokens else None,
        "ignore": list(request.recipe.ignore),
        **stage.model_dump(exclude={"name"}, exclude_none=True),
        "dtype": _dtype(request.model) if stage.dtype == "auto" else stage.dtype,
    }


def _dtype(model: Path) -> str:
    """Return the type of a float model's weights, as its configuration says."""
    config = json.loads((model / "config.json").read_text())
    return str(config.get("dtype") or config.get("torch_dtype") or "bfloat16")


def _finish_stage(made: Path, model: Path, folder: Path) -> None:
    """Complete a stage's checkpoint with what tools leave out, and give it its name."""
    if not (made / "config.json").is_file() or not any(made.glob("*.safetensors")):
        raise WeightToolError(
            f"{made} is no checkpoint although the tool said nothing: look into the log beside it."
        )
    for name in ("chat_template.jinja", "generation_config.json"):
        if (model / name).is_file() and not (made / name).is_file():
            shutil.copyfile(model / name, made / name)
    made.rename(folder)
