"""The committed checkpoints that real tools made from a tiny model (tests/data/quantised)."""

from __future__ import annotations

import importlib.util
from pathlib import Path

FOLDER = Path(__file__).resolve().parents[1] / "data" / "quantised"

#: Every one of them has a recipe of its name.
NAMES = sorted(path.stem for path in (FOLDER / "recipes").glob("*.yaml"))


def checkpoint(name: str) -> Path:
    """Return the folder of a checkpoint."""
    return FOLDER / name


def write_base(folder: Path) -> None:
    """Write the float model that they were made from."""
    spec = importlib.util.spec_from_file_location("quantised_base", FOLDER / "base.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.write_base(folder)
