"""What a process holds of a checkpoint once it is loaded: its bytes, and no second copy."""

from __future__ import annotations

from pathlib import Path

import pytest
from engines import EngineProcess
from large_checkpoints import INPUTS, write_large
from prompts import tokens
from tiny_engines import TinyModels, settings

pytestmark = pytest.mark.engine

RUN = {"prompts": [tokens(40, seed=1)], "max_tokens": 4}
PAGES = 32 << 20
#: Rotary angles, and what the allocator rounds up. A float copy of one layer would be 30 MiB.
SLACK = 2 << 20
#: Of a small engine's steps and its Python objects, whatever the checkpoint.
REST = 24 << 20


@pytest.fixture(scope="module")
def imported(plugin: EngineProcess, tiny: TinyModels) -> EngineProcess:
    """The process after an engine: what engines import is in memory already."""
    answer = plugin.run(settings(tiny("llama")), RUN)
    assert "Loading took" in answer.log
    return plugin


@pytest.mark.parametrize("scheme", INPUTS)
def test_resident_bytes_are_those_of_the_checkpoint(
    imported: EngineProcess, tmp_path: Path, scheme: str
) -> None:
    path = write_large(tmp_path / scheme, scheme)
    stored = (path / "model.safetensors").stat().st_size
    engine = settings(str(path), dtype="bfloat16", max_model_len=512, kv_cache_memory_bytes=PAGES)
    answer = imported.run(engine, RUN)
    load = answer.load
    assert load["checkpoint_bytes"] == pytest.approx(stored, rel=0.01)
    assert stored > 40 << 20, "enough to stand out"
    assert 0.95 * stored < load["resident_bytes"] < 1.05 * stored + SLACK
    assert load["seconds"] > 0
    assert f"and {load['resident_bytes'] / 2**20:.1f} MiB of memory for" in answer.log
    # Steps make no copy either.
    assert load["grown"] < 1.05 * stored + PAGES + REST
