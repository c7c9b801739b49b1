"""Tensor parallel engines, and pages that one process writes and another reads."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from engines import Answer, EngineProcess, assert_same
from int8_engines import VARIANTS, Int8Models
from mtp_cases import MIMO, counted, mtp
from prompts import tokens
from tiny_engines import TinyModels, settings

from ascend_plugin.spec_decode.token_order import TokenOrder, save_order

pytestmark = pytest.mark.engine

PROMPTS = [tokens(length, seed=i) for i, length in enumerate((5, 40, 129, 200))]
RUN = {"prompts": PROMPTS, "max_tokens": 12}


@pytest.fixture(scope="module")
def parallel() -> Iterator[EngineProcess]:
    """Engines of two workers, each with its own processor."""
    process = EngineProcess({"VLLM_CPU_OMP_THREADS_BIND": "0|1"})
    yield process
    process.stop()


TWO: dict[str, Any] = {"tensor_parallel_size": 2}


@pytest.mark.slow
def test_tensor_parallel(parallel: EngineProcess, plugin: EngineProcess, tiny: TinyModels) -> None:
    answer = parallel.run(settings(tiny("llama"), **TWO), RUN)
    assert answer.made_of == {"executor": "MultiprocExecutor"}
    assert_same(plugin.run(settings(tiny("llama")), RUN).outputs(), answer.outputs())


@pytest.mark.slow
def test_tensor_parallel_int8(parallel: EngineProcess, int8: Int8Models) -> None:
    """Each worker has the scales of its own heads, and its counts reach this process."""
    model = int8("llama")
    answer = parallel.run(model.engine("c8p", block_size=32, **TWO), RUN)
    model.check(answer, PROMPTS, model.caches("c8p", block_size=32))
    rows, *_ = answer.counters["c8p"]
    written = sum(map(len, PROMPTS)) + len(PROMPTS) * (RUN["max_tokens"] - 1)
    assert rows == written * 2 * 2 * model.offline.layers  # of both workers together


@pytest.mark.slow
def test_tensor_parallel_drafts(
    parallel: EngineProcess, plugin: EngineProcess, tiny: TinyModels, tmp_path: Path
) -> None:
    """Each worker has all kept rows of the draft head, and leaves out the layer in the same steps.

    One after the other, so that steps and their numbers of drafts are the same in both engines.
    """
    head = tmp_path / "head.safetensors"
    save_order(head, TokenOrder(torch.arange(0, 256, 2).int(), 256), {})
    speculation = {"draft_head": {"file": str(head)}, "adaptive": True}
    engine = settings(
        tiny("mimo", **MIMO),
        block_size=16,
        additional_config={"speculation": speculation},
        **mtp(3),
    )
    runs = [{"prompts": [p], "max_tokens": 40, "script": (2, 0, 0, 3)} for p in PROMPTS[:2]]
    wanted = plugin.run(engine, *runs)
    answer = parallel.run(engine | TWO, *runs)
    assert answer.made_of == {"executor": "MultiprocExecutor"}
    for i in range(len(runs)):
        assert_same(wanted.outputs(i), answer.outputs(i))
        assert counted(answer.runs[i], 3) == counted(wanted.runs[i], 3)
    assert answer.metrics["vllm:spec_decode_num_accepted_tokens"] > 5


BLOCK = 32
PROMPT = tokens(5 * BLOCK + 7, seed=9)
FULL_BLOCKS = list(range(1, 6))  # block 0 is vLLM's null block
STORED = {"prompts": [PROMPT], "max_tokens": 12}


def _connected(engine: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Settings with a connector that keeps pages of whole prompts in files."""
    connector = {
        "kv_connector": "ExampleConnector",
        "kv_role": "kv_both",
        "kv_connector_extra_config": {"shared_storage_path": str(folder)},
    }
    return engine | {
        "kv_transfer_config": connector,
        "enable_prefix_caching": False,
        "max_num_batched_tokens": 512,
        "block_size": BLOCK,
    }


@pytest.fixture(scope="module")
def pair(plugin: EngineProcess) -> Iterator[tuple[EngineProcess, EngineProcess]]:
    """Two processes: one will store pages, the other load them."""
    other = EngineProcess({})
    yield plugin, other
    other.stop()


def _store_and_load(
    pair: tuple[EngineProcess, EngineProcess], engine: dict[str, Any]
) -> list[Answer]:
    """Run the same prompt in both processes, one after the other."""
    digests = {"prompts": [], "page_digests": FULL_BLOCKS}
    return [process.run(engine, STORED, digests) for process in pair]


def _assert_same_pages(stored: Answer, loaded: Answer) -> None:
    digests = [answer.runs[1]["page_digests"] for answer in (stored, loaded)]
    assert digests[0] == digests[1]
    assert len(set(digests[0])) == len(digests[0]) > 1  # every layer has its own
    assert "External Cache Hit" in loaded.log
    assert "External Cache Hit" not in stored.log


@pytest.mark.slow
@pytest.mark.parametrize("variant", VARIANTS)
def test_pages_of_another_process(
    pair: tuple[EngineProcess, EngineProcess], int8: Int8Models, tmp_path: Path, variant: str
) -> None:
    model = int8("llama")
    stored, loaded = _store_and_load(pair, _connected(model.engine(variant), tmp_path))
    _assert_same_pages(stored, loaded)
    for answer in (stored, loaded):
        model.check(answer, [PROMPT], model.caches(variant, block_size=BLOCK))
    rows = [answer.counters[variant][0] for answer in (stored, loaded)]
    assert rows[0] - rows[1] == len(FULL_BLOCKS) * BLOCK * 2 * 2 * model.offline.layers


@pytest.mark.slow
def test_unquantised_pages_of_another_process(
    pair: tuple[EngineProcess, EngineProcess], tiny: TinyModels, tmp_path: Path
) -> None:
    stored, loaded = _store_and_load(pair, _connected(settings(tiny("llama")), tmp_path))
    _assert_same_pages(stored, loaded)
    assert_same(stored.outputs(), loaded.outputs())
