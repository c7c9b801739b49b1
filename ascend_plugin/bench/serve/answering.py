"""The other end of ``driver.WorkerProcess``: commands from stdin, answers to stdout."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from dataclasses import asdict

from ascend_plugin.bench.serve import messages


def answer_commands(run: Callable[[messages.Command], messages.Answer]) -> None:
    """Answer commands until stdin ends.

    Answers go to what was stdout at start; everything that libraries print there goes to stderr.
    """
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    for line in sys.stdin:
        name, arguments = json.loads(line)
        answer = run(messages.COMMANDS[name](**arguments))
        answers.write(json.dumps(asdict(answer)) + "\n")
        answers.flush()
