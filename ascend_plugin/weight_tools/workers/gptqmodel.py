"""One stage of a recipe with GPTQModel: ``python gptqmodel.py JOB.json``.

Runs in the tool's own environment and imports nothing of this project. The job's ``arguments`` are
those of ``QuantizeConfig``.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

# This script bears the tool's name; its folder must not come first.
sys.path.pop(0)


def report(what: str, done: int, total: int) -> None:
    """Tell the command that waits how far this is."""
    print("@progress " + json.dumps([what, done, total]), flush=True)


def main() -> None:
    """Run the job."""
    # Without this it starts more workers than small machines have processors, and waits.
    os.environ.setdefault("GPTQMODEL_CPU_WORKERS", str(len(os.sched_getaffinity(0))))
    job = json.loads(Path(sys.argv[1]).read_text())
    report("loading the model", 0, 1)
    from gptqmodel import GPTQModel, QuantizeConfig
    from safetensors.torch import load_file

    rows = load_file(job["tokens"])["input_ids"]  # [windows, context]
    batches = [{"input_ids": row.tolist(), "attention_mask": [1] * len(row)} for row in rows]
    exclusions: dict[str, dict[str, int]] = {
        f"-:{name}": {} for name in job["ignore"] if name != "lm_head"
    }
    config = QuantizeConfig(**job["arguments"], dynamic=exclusions or None)
    model = GPTQModel.load(job["model"], config, device="cpu")
    report("quantising", 0, 1)
    model.quantize(batches, batch_size=1)
    report("saving", 0, 1)
    model.save(job["output"])
    if model.tokenizer is not None:
        model.tokenizer.save_pretrained(job["output"])


if __name__ == "__main__":
    main()
