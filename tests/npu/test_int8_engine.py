"""Engines with an int8 KV cache on the NPU, on operators of torch_npu: the tokens of the CPU's.

Those of heads that these operators do not read are in ``test_ascendc_engine.py``.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from engines import EngineProcess
from int8_engines import Int8Model, Int8Models
from npu_engines import CAPTURED, NPUModels, assert_identical, assert_near, on_the_cpu, settings
from prompts import tokens

from ascend_plugin.ops.ascendc import library

pytestmark = pytest.mark.engine

LAYERS = 2

#: Codes of keys may differ by one, because they are turned in bfloat16: choices of tokens that are
#: as close as this are no mistakes.
NEAR_TIE = 0.2

RUN = {"prompts": [tokens(count, seed=count) for count in (7, 39, 150, 300)], "max_tokens": 10}


@pytest.fixture(scope="module")
def int8(models: NPUModels, tmp_path_factory: pytest.TempPathFactory) -> Int8Models:
    folder: Path = tmp_path_factory.mktemp("scales")
    return Int8Models(models, folder)


@pytest.fixture(scope="module")
def listed(int8: Int8Models) -> Int8Model:
    """Heads that the fused operator lists for int8 pages."""
    return int8("listed", architecture="llama", hidden=160, heads=10, kv_heads=1, layers=LAYERS)


@pytest.fixture(scope="module")
def unlisted(int8: Int8Models) -> Int8Model:
    """Other heads: without kernels pages are dequantised before attention."""
    return int8("unlisted", architecture="llama", heads=4, kv_heads=2, layers=LAYERS)


@pytest.fixture(scope="module")
def without_kernels() -> Iterator[EngineProcess]:
    """Vllm on the NPU as on a machine where the AscendC kernels are not built."""
    process = EngineProcess({"VLLM_LOGGING_LEVEL": "INFO", library.SWITCH: "0"})
    yield process
    process.stop()


def _engine(model: Int8Model, variant: str, graphs: str = "eager") -> dict[str, Any]:
    return settings(
        model.path,
        graphs,
        kv_cache_dtype="int8_per_token_head",
        additional_config=model.config(variant),
    )


@pytest.mark.parametrize("variant", ["c8d", "c8s"])
def test_tokens_are_those_of_the_cpu(
    npu: EngineProcess, cpu: EngineProcess, listed: Int8Model, variant: str
) -> None:
    wanted = cpu.run(on_the_cpu(_engine(listed, variant)), RUN)
    eager = npu.run(_engine(listed, variant), RUN)
    assert eager.made_of["dtypes"] == ["torch.int8"]
    used = ["npu", "npu-gather"]
    if not library.why_missing():
        used = ["ascendc", "ascendc-gather"] if variant == "c8d" else ["ascendc-gather", "npu"]
    assert eager.made_of["implementations"]["paged_attention (npu)"] == used
    assert_near(wanted.outputs(), eager.outputs(), NEAR_TIE)


@pytest.mark.parametrize("variant", ["c8d", "c8s"])
def test_decode_runs_from_graphs(
    npu: EngineProcess, without_kernels: EngineProcess, listed: Int8Model, variant: str
) -> None:
    """With the fused operator, which reads c8d only where there are no kernels."""
    process = without_kernels if variant == "c8d" else npu
    eager = process.run(_engine(listed, variant), RUN)
    full = process.run(_engine(listed, variant, "full"), RUN)
    assert_identical(eager.outputs(), full.outputs())
    assert full.made_of["graphs"]["task_groups"] == len(CAPTURED) * LAYERS
    assert full.made_of["graphs"]["updates"] > 0


def test_other_heads_are_served_without_kernels(
    without_kernels: EngineProcess, cpu: EngineProcess, unlisted: Int8Model
) -> None:
    wanted = cpu.run(on_the_cpu(_engine(unlisted, "c8d")), RUN)
    answer = without_kernels.run(_engine(unlisted, "c8d", "full and piecewise"), RUN)
    told = answer.made_of["implementations"]
    assert told["kv_cache_write (npu)"] == ["npu"]
    assert told["paged_attention (npu)"] == ["npu-gather"]
    assert_near(wanted.outputs(), answer.outputs(), NEAR_TIE)
    counts = answer.made_of["graphs"]
    assert counts["task_groups"] == 0
    assert counts["captures"] == len(CAPTURED) * (LAYERS + 1)


def test_patches_are_refused_without_kernels(
    without_kernels: EngineProcess, listed: Int8Model
) -> None:
    with pytest.raises(RuntimeError, match=r"only AscendC kernels read its patches, .*unset it"):
        without_kernels.run(_engine(listed, "c8p"), RUN)
