"""One stage of a recipe with msmodelslim: ``python msmodelslim.py JOB.json``.

Runs in the tool's own environment and imports nothing of this project. The job's ``config`` is
msmodelslim's own configuration; calibration text, modules that stay float and the writer join it.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any


def report(what: str, done: int, total: int) -> None:
    """Tell the command that waits how far this is."""
    print("@progress " + json.dumps([what, done, total]), flush=True)


def configuration(job: dict[str, Any]) -> dict[str, Any]:
    """Return the configuration with text, ``exclude`` and writer filled in."""
    config: dict[str, Any] = {"apiversion": "modelslim_v1", **job["config"]}
    spec = config.setdefault("spec", {})
    if config["apiversion"] == "modelslim_v1":
        for process in spec.get("process", []):
            if process.get("type") == "linear_quant":
                process["exclude"] = [*process.get("exclude", []), *job["ignore"]]
        spec.setdefault("save", [{"type": "ascendv1_saver", "part_file_size": 4}])
        if job["tokens"]:
            spec["dataset"] = str(Path(job["tokens"]).with_suffix(".jsonl"))
    return config


def model_in(job: dict[str, Any], folder: Path) -> Path:
    """Return a copy of the model in the job's type, in which msmodelslim computes.

    Its transformers 4 does not know the tokenizer class that transformers 5 writes.
    """
    import torch
    from safetensors.torch import load_file, save_file

    source, kind = Path(job["model"]), getattr(torch, job["dtype"])
    copy = folder / "as-computed"
    shutil.rmtree(copy, ignore_errors=True)
    copy.mkdir()
    for path in source.iterdir():
        if path.suffix == ".safetensors":
            weights = {name: weight.to(kind) for name, weight in load_file(path).items()}
            save_file(weights, copy / path.name, {"format": "pt"})
        elif path.is_file():
            shutil.copyfile(path, copy / path.name)
    config = json.loads((source / "config.json").read_text())
    config.pop("dtype", None)
    (copy / "config.json").write_text(json.dumps(config | {"torch_dtype": job["dtype"]}, indent=2))
    tokenizer = copy / "tokenizer_config.json"
    about = json.loads(tokenizer.read_text())
    if about.get("tokenizer_class") == "TokenizersBackend":
        about["tokenizer_class"] = "PreTrainedTokenizerFast"
    tokenizer.write_text(json.dumps(about, indent=2))
    return copy


def main() -> None:
    """Run the job."""
    path = Path(sys.argv[1])
    job = json.loads(path.read_text())
    model = model_in(job, path.parent)
    described = path.with_name("msmodelslim.yaml")
    described.write_text(json.dumps(configuration(job), indent=2))  # JSON is YAML
    layers = json.loads((model / "config.json").read_text())["num_hidden_layers"]
    process = subprocess.Popen(
        [
            str(Path(sys.executable).with_name("msmodelslim")),
            "quant",
            *("--model_type", "default", "--device", "cpu", "--trust_remote_code", "False"),
            *("--model_path", str(model), "--save_path", job["output"]),
            *("--config_path", str(described)),
        ],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert process.stdout is not None
    for line in process.stdout:
        print(line, end="", flush=True)
        step = re.search(r'Run processor (\w+).* for ".*\.layers\.(\d+)"', line)
        if step:
            report(step[1], int(step[2]), layers)
    process.wait()
    shutil.rmtree(model, ignore_errors=True)
    if process.returncode != 0:
        raise SystemExit(process.returncode)
    output = Path(job["output"])
    for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"):
        if (Path(job["model"]) / name).is_file():
            shutil.copyfile(Path(job["model"]) / name, output / name)


if __name__ == "__main__":
    main()
