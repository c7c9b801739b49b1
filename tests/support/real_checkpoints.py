"""The committed checkpoints that real tools made from a tiny model (tests/data/quantised)."""

from __future__ import annotations

import importlib.util
from pathlib import Path

from offline_llama import FakeCache, OfflineLlama
from quant_checkpoints import FakeLinear
from quant_oracle import Meant

FOLDER = Path(__file__).resolve().parents[1] / "data" / "quantised"

#: Every one of them has a recipe of its name.
NAMES = sorted(path.stem for path in (FOLDER / "recipes").glob("*.yaml"))

#: What the plugin must say that it runs, by the beginning of a name.
_RUNS_AS = {
    "lc-w8a8-dynamic": "W8A8_DYNAMIC",
    "lc-w8a8-static": "W8A8",
    "lc-w4": "W4A16",
    "ms-w8a8-c8": "W8A8",
    "ms-w8a8-dynamic": "W8A8_DYNAMIC",
    "ms-w8a16": "W8A16",
    "ms-w4a8": "W4A16",
    "gm-": "W4A16",
    "ar-": "W4A16",
}


def runs_as(name: str) -> str:
    """Return the scheme that a checkpoint must run as."""
    return next(scheme for start, scheme in _RUNS_AS.items() if name.startswith(start))


def checkpoint(name: str) -> Path:
    """Return the folder of a checkpoint."""
    return FOLDER / name


def prompts(*lengths: int) -> list[list[int]]:
    """Return prompts of the tokenizer's letters."""
    return [[(7 * i * i + seed) % 29 + 3 for i in range(n)] for seed, n in enumerate(lengths)]


def write_base(folder: Path) -> None:
    """Write the float model that they were made from."""
    spec = importlib.util.spec_from_file_location("quantised_base", FOLDER / "base.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.write_base(folder)


def offline(base: Path, meant: Meant) -> tuple[OfflineLlama, list[FakeCache]]:
    """Return the model that a checkpoint means, and what its KV cache does.

    Args:
        base: folder of the float model.
        meant: the checkpoint's weights, as the oracle reads them.
    """
    model = OfflineLlama(str(base))
    assert model.weights.keys() == meant.weights.keys()
    model.weights |= meant.weights
    for module, fake in meant.fakes.items():
        model.weights[f"{module}.weight"] = FakeLinear(meant.weights[f"{module}.weight"], fake)
    caches = [
        FakeCache("c8s", meant.kv_scales[i]) if i in meant.kv_scales else FakeCache()
        for i in range(model.layers)
    ]
    return model, caches
