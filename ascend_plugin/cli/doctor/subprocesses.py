"""Questions that only a fresh process answers: an import may fail, hang or kill it."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass

#: Importing vLLM takes seconds; on a busy machine many.
TIMEOUT_S = 180.0

_MARK = "ascend-plugin-doctor:"


@dataclass(frozen=True, slots=True)
class Answer:
    """What a process said.

    Attributes:
        text: what it passed to ``answer()``; None when it failed.
        error: its last line on stderr; empty when it did not fail.
    """

    text: str | None
    error: str = ""


def ask(
    code: str, environment: Mapping[str, str | None] | None = None, timeout: float = TIMEOUT_S
) -> Answer:
    """Run Python code in a fresh process.

    Args:
        code: statements that call ``answer(text)`` once.
        environment: variables to set, or with None to unset.
        timeout: seconds after which the process is killed.
    """
    variables = dict(os.environ)
    for name, value in (environment or {}).items():
        variables.pop(name, None)
        if value is not None:
            variables[name] = value
    program = f"def answer(text): print({_MARK!r} + str(text), flush=True)\n{code}"
    try:
        done = subprocess.run(
            [sys.executable, "-c", program],
            env=variables,
            capture_output=True,
            text=True,
            timeout=timeout,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return Answer(None, f"no answer within {timeout:g} seconds")
    for line in done.stdout.splitlines():
        if line.startswith(_MARK):
            return Answer(line.removeprefix(_MARK))
    lines = [line for line in done.stderr.splitlines() if line.strip()]
    return Answer(None, lines[-1].strip() if lines else f"exit code {done.returncode}")
