"""LoRA: an adapted engine answers like one whose weights have the adapter added."""

from __future__ import annotations

from pathlib import Path

import pytest
from adapters import write_adapter, write_merged
from engines import EngineProcess, assert_same, first_differences
from prompts import tokens
from tiny_engines import TinyModels, settings

pytestmark = pytest.mark.engine

PROMPTS = [tokens(length, seed=length) for length in (7, 40, 130)]
STEPS = 12
LORA = {"enable_lora": True, "max_lora_rank": 8}


@pytest.fixture(scope="module")
def adapted(tiny: TinyModels, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, list[str]]:
    """A model and two adapters."""
    folder = tmp_path_factory.mktemp("adapters")
    model = tiny("llama")
    return model, [write_adapter(model, folder / str(seed), seed) for seed in (1, 2)]


@pytest.mark.parametrize("slots", [1, 2])
def test_an_adapter_means_what_it_adds_to_the_weights(
    plugin: EngineProcess, adapted: tuple[str, list[str]], tmp_path: Path, slots: int
) -> None:
    """For its own requests alone, in one batch with others'."""
    model, adapters = adapted
    used = [*adapters[:slots], None]  # the last of them with no adapter
    run = {
        "prompts": [prompt for prompt in PROMPTS for _ in used],
        "max_tokens": STEPS,
        "adapters": used * len(PROMPTS),
    }
    engine = settings(model, **LORA, max_loras=slots)
    outputs = plugin.run(engine, run).outputs()
    for i, adapter in enumerate(used):
        plain = model if adapter is None else write_merged(model, adapter, tmp_path / str(i))
        wanted = plugin.run(settings(plain), {"prompts": PROMPTS, "max_tokens": STEPS}).outputs()
        assert_same(wanted, outputs[i :: len(used)], tolerance=1e-3)
        if adapter is None:
            unadapted = wanted
    assert len(first_differences(unadapted, outputs[:: len(used)])) == len(PROMPTS)
