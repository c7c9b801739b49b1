"""``vllm serve`` on an NPU from the outside: a question over HTTP, and a clean stop."""

from __future__ import annotations

from pathlib import Path

import pytest
from serving import expect_an_answer, serving, stop

pytestmark = [pytest.mark.engine, pytest.mark.slow]

#: Whole decode steps come from a graph, and prefill runs eagerly.
FULL = ["-cc.mode=0", "-cc.cudagraph_mode=FULL_DECODE_ONLY", "-cc.cudagraph_capture_sizes=[1]"]
OPTIONS = ["--dtype", "bfloat16", "--max-model-len", "256", "--kv-cache-memory-bytes", "67108864"]


@pytest.mark.model
def test_a_question_is_answered(smollm2: str, tmp_path: Path) -> None:
    """By the real model, all 30 layers; its answer is the one of the CPU platform's test."""
    with serving(tmp_path, smollm2, *OPTIONS, *FULL) as server:
        expect_an_answer(server, "What is the capital of France?", "Paris")
        log = server[2].read_text()
        assert "device_config=npu" in log
        assert "Capturing CUDA graphs (decode, FULL): 100%" in log
        assert "paged_attention (npu) runs on 'npu'" in log
        stop(server)
