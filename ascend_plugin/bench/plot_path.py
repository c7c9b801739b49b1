"""Where a picture may go."""

from __future__ import annotations

import importlib.util
from pathlib import Path

from ascend_plugin.bench.errors import BenchError

_FORMATS = (".png", ".svg")


def check_plot_path(path: Path) -> None:
    """Refuse a picture that cannot be made, before the measurement starts.

    Raises:
        BenchError: unknown format, missing folder, or matplotlib is not installed.
    """
    if path.suffix.lower() not in _FORMATS:
        raise BenchError(f"--plot {path} must end in one of {', '.join(_FORMATS)}.")
    if not path.parent.is_dir():
        raise BenchError(f"--plot {path}: there is no folder {path.parent}. Make it first.")
    if importlib.util.find_spec("matplotlib") is None:
        raise BenchError("--plot needs matplotlib. Run: pip install matplotlib==3.11.2")
