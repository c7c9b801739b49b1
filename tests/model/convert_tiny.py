"""Converts a small GGUF in a process of its own: ``convert_tiny.py GGUF DIR [KEY=VALUE ...]``.

Keys: ``file_limit`` (largest file that may be written, in bytes), ``kill_at`` (die by SIGKILL
when progress says this), ``sleep_at`` (take half a second there), ``checkpoint_bytes``. Prints the
status, or the error and exit code 1.
"""

from __future__ import annotations

import hashlib
import os
import resource
import signal
import sys
import time
from pathlib import Path

from ascend_plugin.model.errors import ModelError
from ascend_plugin.model.gguf_source import ModelSource
from ascend_plugin.model.smollm2 import convert_checkpoint


def main(gguf: Path, directory: Path, options: dict[str, str]) -> int:
    """Runs one conversion under the conditions in `options`."""
    source = ModelSource(
        distribution="tiny-gguf",
        version="1.0",
        member="tiny_gguf/tiny.gguf",
        sha256=hashlib.sha256(gguf.read_bytes()).hexdigest(),
        license="Apache-2.0",
        wheel_bytes=0,
        gguf_bytes=0,
        checkpoint_bytes=int(options.get("checkpoint_bytes", 0)),
    )
    if limit := options.get("file_limit"):
        resource.setrlimit(resource.RLIMIT_FSIZE, (int(limit), int(limit)))

    def progress(what: str, _done: int, _total: int) -> None:
        if what == options.get("kill_at"):
            os.kill(os.getpid(), signal.SIGKILL)
        if what == options.get("sleep_at"):
            time.sleep(0.5)

    try:
        print(convert_checkpoint(source, directory, gguf=gguf, progress=progress).status)
    except ModelError as err:
        print(err)
        return 1
    return 0


if __name__ == "__main__":
    pairs = dict(argument.split("=", 1) for argument in sys.argv[3:])
    sys.exit(main(Path(sys.argv[1]), Path(sys.argv[2]), pairs))
