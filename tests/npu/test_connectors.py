"""Pages that one engine on an NPU stores and another one, in another process, loads."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from engines import EngineProcess
from int8_engines import Int8Models
from npu_engines import NPUModels, assert_near, settings
from prompts import tokens

pytestmark = [pytest.mark.engine, pytest.mark.slow]

BLOCK = 32
FULL_BLOCKS = list(range(1, 6))  # block 0 is vLLM's null block
RUN = {"prompts": [tokens(len(FULL_BLOCKS) * BLOCK + 7, seed=9)], "max_tokens": 8}
DIGESTS = {"prompts": [], "page_digests": FULL_BLOCKS}


@pytest.fixture(scope="module")
def other() -> Iterator[EngineProcess]:
    """The process that loads."""
    process = EngineProcess({"VLLM_LOGGING_LEVEL": "INFO"})
    yield process
    process.stop()


def _int8(models: NPUModels, scales: Path) -> dict[str, Any]:
    model = Int8Models(models, scales)("stored", architecture="llama", kv_heads=2, layers=2)
    cache = {"kv_cache_dtype": "int8_per_token_head", "additional_config": model.config("c8s")}
    return {"model": model.path, **cache}


@pytest.mark.parametrize("cache", ["bfloat16", "c8s"])
def test_pages_of_another_process(
    npu: EngineProcess, other: EngineProcess, models: NPUModels, tmp_path: Path, cache: str
) -> None:
    """Byte for byte; the second engine computes only what is no whole block."""
    told = {"model": models("qwen3", layers=2)} if cache == "bfloat16" else _int8(models, tmp_path)
    connector = {
        "kv_connector": "ExampleConnector",
        "kv_role": "kv_both",
        "kv_connector_extra_config": {"shared_storage_path": str(tmp_path / "pages")},
    }
    engine = settings(
        **told,
        block_size=BLOCK,
        max_num_batched_tokens=512,
        enable_prefix_caching=False,
        kv_transfer_config=connector,
    )
    stored, loaded = npu.run(engine, RUN, DIGESTS), other.run(engine, RUN, DIGESTS)
    digests = [answer.runs[1]["page_digests"] for answer in (stored, loaded)]
    assert digests[0] == digests[1]
    assert len(set(digests[0])) == 2  # each layer has its own
    assert "External Cache Hit" in loaded.log
    assert "External Cache Hit" not in stored.log
    # The rest of the prompt is a batch of its own then, which may round otherwise.
    assert_near(stored.outputs(), loaded.outputs(), 0.2)
