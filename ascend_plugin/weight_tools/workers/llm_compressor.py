"""One stage of a recipe with llm-compressor: ``python llm_compressor.py JOB.json``.

Runs in the tool's own environment and imports nothing of this project. The job names the model,
the modifiers in llm-compressor's words, the tokens to calibrate on, and where the result goes.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any


def report(what: str, done: int, total: int) -> None:
    """Tell the command that waits how far this is."""
    print("@progress " + json.dumps([what, done, total]), flush=True)


def report_bars() -> None:
    """Turn tqdm's bars into reports; before llm-compressor imports tqdm."""
    import tqdm

    class Reporting(tqdm.tqdm):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **{**kwargs, "file": sys.stderr, "mininterval": 5})
            self._tell()

        def update(self, n: float | None = 1) -> Any:
            self._tell(n or 0)
            return super().update(n)

        def __iter__(self) -> Any:
            for done, item in enumerate(super().__iter__()):
                report(self.desc.rstrip(": "), done, int(self.total or 0))
                yield item

        def _tell(self, more: float = 0) -> None:
            report(self.desc.rstrip(": "), int(self.n + more), int(self.total or 0))

    tqdm.tqdm = Reporting


def no_pinning() -> None:
    """Leave host memory unpinned where there is no accelerator: AWQ fails there otherwise.

    llm-compressor 0.14.0.1 pins its cached activations whether or not there is a device.
    """
    import torch
    from llmcompressor.pipelines.cache import IntermediatesCache

    if not torch.accelerator.is_available():
        IntermediatesCache.pin_memory = lambda *args, **kwargs: None


def no_centring(model: Any) -> None:
    """Leave embeddings as they are before models with RMS norms.

    llm-compressor 0.14.0.1 subtracts their mean before it rotates (SpinQuant's R1), which changes
    nothing below norms that subtract it themselves, but all below those that do not.
    """
    import torch
    from llmcompressor.modifiers.transform.spinquant import base

    if not any(isinstance(module, torch.nn.LayerNorm) for module in model.modules()):
        base.center_embeddings = lambda embedding: None


def smooth_by_inputs() -> None:
    """Let SmoothQuant measure what down_proj reads when up_proj takes its scales.

    llm-compressor 0.14.0.1 measures what the scaled layer puts out. That is the input of the
    balanced layers where the scaled one is a norm, but down_proj reads a product with up_proj's
    output: smoothing by the factor alone makes it worse.
    """
    import torch
    from llmcompressor.modifiers.transform.smoothquant import base

    own_hooks = base.SmoothQuantModifier._setup_scale_hooks

    def set_up(self: Any) -> None:
        every = self.resolved_mappings_
        matrices = [mapping for mapping in every if mapping.smooth_layer.weight.ndim > 1]
        self.resolved_mappings_ = [mapping for mapping in every if mapping not in matrices]
        own_hooks(self)
        self.resolved_mappings_ = every
        for mapping in matrices:
            self.register_hook(
                mapping.balance_layers[0], range_of_input(self, mapping.smooth_name), "forward_pre"
            )

    def range_of_input(modifier: Any, name: str) -> Any:
        def hook(module: Any, arguments: Any) -> None:
            rows = arguments[0].flatten(0, -2)  # [tokens, channels]
            low, high = rows.amin(0), rows.amax(0)
            if seen := modifier.scales_.get(name):
                low = torch.minimum(low, seen.min_channel_vals)
                high = torch.maximum(high, seen.max_channel_vals)
            modifier.scales_[name] = base.SmoothQuantScale(
                min_channel_vals=low, max_channel_vals=high
            )

        return hook

    base.SmoothQuantModifier._setup_scale_hooks = set_up


def forget_fused(folder: Path) -> None:
    """Remove a quantisation that is none from a checkpoint: rotations multiplied into weights.

    Nothing is left to do for who serves it, and transformers 5.23 cannot load one without groups of
    quantised layers, which the next stage has to.
    """
    path = folder / "config.json"
    config = json.loads(path.read_text())
    found = config.get("quantization_config") or {}
    rotations = (found.get("transform_config") or {}).get("config_groups") or {}
    places = [use["location"] for each in rotations.values() for use in each["apply"]]
    if places and not found.get("config_groups") and all(p.startswith("weight_") for p in places):
        del config["quantization_config"]
        path.write_text(json.dumps(config, indent=2) + "\n")


def modifiers_of(job: dict[str, Any]) -> list[Any]:
    """Build the stage's modifiers; the job's ``ignore`` joins those that have one."""
    from llmcompressor.modifiers.gptq import GPTQModifier
    from llmcompressor.modifiers.quantization import QuantizationModifier
    from llmcompressor.modifiers.transform import (
        AWQModifier,
        QuIPModifier,
        SmoothQuantModifier,
        SpinQuantModifier,
    )

    known = {
        kind.__name__: kind
        for kind in (
            AWQModifier,
            GPTQModifier,
            QuantizationModifier,
            QuIPModifier,
            SmoothQuantModifier,
            SpinQuantModifier,
        )
    }
    made = []
    for name, arguments in job["modifiers"].items():
        if name not in known:
            raise SystemExit(f"modifier {name!r} is unknown; use one of {', '.join(sorted(known))}")
        given = dict(arguments or {})
        if name in ("GPTQModifier", "QuantizationModifier", "QuIPModifier"):
            own = given.get("ignore") or []
            own = [own] if isinstance(own, str) else own
            given["ignore"] = list(dict.fromkeys([*own, *job["ignore"]]))
        made.append(known[name](**given))
    return made


def batches(path: str) -> Any:
    """Return the calibration windows ``[windows, tokens]``, one in a batch."""
    import torch
    from safetensors.torch import load_file
    from torch.utils.data import DataLoader

    ids = load_file(path)["input_ids"]
    rows: Any = [{"input_ids": row, "attention_mask": torch.ones_like(row)} for row in ids]
    return DataLoader(rows, batch_size=1)


def main() -> None:
    """Run the job."""
    job = json.loads(Path(sys.argv[1]).read_text())
    report("loading llm-compressor", 0, 1)
    report_bars()
    from llmcompressor import oneshot
    from transformers import AutoModelForCausalLM, AutoTokenizer

    no_pinning()
    smooth_by_inputs()
    report("loading the model", 0, 1)
    model = AutoModelForCausalLM.from_pretrained(
        job["model"], dtype=job["dtype"], local_files_only=True
    )
    no_centring(model)
    more = {"dataset": batches(job["tokens"])} if job["tokens"] else {}
    oneshot(model=model, recipe=modifiers_of(job), **more)
    report("saving", 0, 1)
    model.save_pretrained(job["output"], save_compressed=True)
    forget_fused(Path(job["output"]))
    # The next stage would read it, and llm-compressor cannot parse the mappings that it writes.
    Path(job["output"], "recipe.yaml").unlink(missing_ok=True)
    tokenizer = AutoTokenizer.from_pretrained(job["model"], local_files_only=True)
    tokenizer.save_pretrained(job["output"])


if __name__ == "__main__":
    main()
