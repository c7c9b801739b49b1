"""Results on stdout, everything else on stderr."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TextIO

from rich.console import Console

#: Columns of a table that is not shown on a terminal: wide enough to cut nothing.
_FILE_WIDTH = 200


@contextmanager
def clean_stdout() -> Iterator[TextIO]:
    """Yield the real stdout; whatever else writes to stdout meanwhile lands on stderr.

    The redirection is at the level of file descriptors: vLLM's log handlers, C++ code and child
    processes follow it too.
    """
    sys.stdout.flush()
    saved = os.dup(1)
    os.dup2(2, 1)
    try:
        with os.fdopen(os.dup(saved), "w", encoding="utf-8") as stdout:
            yield stdout
    finally:
        sys.stdout.flush()
        os.dup2(saved, 1)
        os.close(saved)


def write_json(
    stdout: TextIO,
    rows: Sequence[Mapping[str, object]],
    meta: Mapping[str, object],
    **more: Sequence[Mapping[str, object]],
) -> None:
    """Write the one JSON object of a result; ``more`` are rows of other kinds, by name."""
    result = {"rows": list(rows), **more, "meta": dict(meta)}
    json.dump(result, stdout, indent=2, allow_nan=False)
    stdout.write("\n")


def table_console(stdout: TextIO) -> Console:
    """Return a console for tables on ``stdout`` that does not cut them in files and pipes."""
    return Console(file=stdout, width=None if stdout.isatty() else _FILE_WIDTH, highlight=False)


@contextmanager
def progress() -> Iterator[Callable[[str], None]]:
    """Yield a function that says on stderr what is being done now.

    One line that changes on a terminal, one line each in a file or pipe.
    """
    console = Console(stderr=True, highlight=False)
    if not console.is_terminal:
        yield remark
        return
    with console.status("starting") as status:
        yield status.update


def remark(line: str) -> None:
    """Print a line on stderr."""
    print(line, file=sys.stderr, flush=True)
