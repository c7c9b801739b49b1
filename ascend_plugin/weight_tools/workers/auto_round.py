"""One stage of a recipe with auto-round: ``python auto_round.py JOB.json``.

Runs in the tool's own environment and imports nothing of this project. The job's ``arguments`` are
AutoRound's own, with ``format`` for what is written.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

# This script bears the tool's name; its folder must not come first.
sys.path.pop(0)


def report(what: str, done: int, total: int) -> None:
    """Tell the command that waits how far this is."""
    print("@progress " + json.dumps([what, done, total]), flush=True)


def main() -> None:
    """Run the job."""
    job = json.loads(Path(sys.argv[1]).read_text())
    report("loading the model", 0, 1)
    import torch
    from auto_round import AutoRound
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM, AutoTokenizer

    arguments = dict(job["arguments"])
    form = arguments.pop("format", "auto_round")
    tokenizer = AutoTokenizer.from_pretrained(job["model"], local_files_only=True)
    model = AutoModelForCausalLM.from_pretrained(
        job["model"], dtype=getattr(torch, job["dtype"]), local_files_only=True
    )
    rows = load_file(job["tokens"])["input_ids"]  # [windows, context]
    batches = [
        {"input_ids": row[None], "attention_mask": torch.ones_like(row)[None]} for row in rows
    ]
    layers = {name: {"bits": 16} for name in job["ignore"] if name != "lm_head"}
    rounder = AutoRound(
        model,
        tokenizer,
        dataset=batches,
        nsamples=len(batches),
        seqlen=rows.shape[1],
        layer_config=layers or None,
        device_map="cpu",
        **arguments,
    )
    report("tuning", 0, 1)
    output = Path(job["output"])
    rounder.quantize_and_save(str(output), format=form)
    # It makes a folder of its own inside.
    for inner in [path for path in output.iterdir() if (path / "config.json").is_file()]:
        for path in inner.iterdir():
            path.rename(output / path.name)
        inner.rmdir()


if __name__ == "__main__":
    main()
