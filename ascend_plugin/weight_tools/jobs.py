"""Runs a worker's script in a tool's environment, and listens to what it reports."""

from __future__ import annotations

import json
import os
import signal
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ascend_plugin.weight_tools.environments import Progress, isolated, tail
from ascend_plugin.weight_tools.errors import WeightToolError

#: Begins a line of a worker's output that is a report: ``[what, done, total]`` in JSON follows.
MARK = "@progress "

_WORKERS = Path(__file__).resolve().parent / "workers"


def worker_script(tool: str) -> Path:
    """Return the script of a tool."""
    return _WORKERS / f"{tool.replace('-', '_')}.py"


def run_worker(
    tool: str, python: Path, job: Mapping[str, Any], folder: Path, title: str, report: Progress
) -> None:
    """Run one job to its end.

    Args:
        tool: whose worker.
        python: of its environment.
        job: what the worker reads.
        folder: receives the job and the log.
        title: of the job, for reports.
        report: told what the worker reports.

    Raises:
        WeightToolError: the worker failed; the end of its log says why.
    """
    described = folder / "job.json"
    described.write_text(json.dumps(job, indent=2) + "\n")
    log_path = folder / "log.txt"
    report(f"{title}: starting {tool}", 0, 1)
    # Nothing is downloaded behind the user's back.
    offline = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
    with log_path.open("a", encoding="utf-8") as log:
        process = subprocess.Popen(
            [str(python), str(worker_script(tool)), str(described)],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
            errors="replace",
            cwd=folder,
            env=isolated() | offline | {"PYTHONUNBUFFERED": "1"},
            start_new_session=True,
        )
        try:
            _listen(process, log, title, report)
        finally:
            # Ctrl-C: neither the worker nor what it started outlives the command.
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
    if process.returncode != 0:
        raise WeightToolError(
            f"{tool} failed at {title} (exit code {process.returncode}). {tail(log_path)}\n"
            "Stages that are done are kept: run the same command again to go on from here."
        )


def _listen(process: subprocess.Popen[str], log: Any, title: str, report: Progress) -> None:
    """Pass reports on and keep the rest in the log, until the worker ends."""
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith(MARK):
            what, done, total = json.loads(line.removeprefix(MARK))
            report(f"{title}: {what}", int(done), int(total))
        else:
            log.write(line)
            log.flush()
    process.wait()
