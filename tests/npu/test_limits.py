"""Limits of the device that a capture may reach, told from mistakes, and what is refused."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
from engines import EngineProcess
from npu_engines import NPUModels, assert_near, settings
from prompts import tokens

from ascend_plugin.ops.sim.options import OPTIONS_VARIABLE, SimulatorOptions

MIB = 1 << 20
OK = nullcontext()

#: One layer of another variant.
C8D = {"1": "c8d"}


@pytest.mark.parametrize(
    ("make", "limit"),
    [
        (lambda: RuntimeError("NPU function error: x, error code is 207008"), "streams"),
        (lambda: RuntimeError("NPU function error: x, error code is 507903"), ""),
        (lambda: ValueError("a mistake"), ""),
    ],
    ids=["streams", "invalid capture", "mistake"],
)
def test_limits_are_told_from_mistakes(make: Callable[[], Exception], limit: str) -> None:
    from ascend_plugin.graph.npu import limit_reached

    broken = RuntimeError("the capture is invalid")  # what ending a broken capture raises
    broken.__context__ = make()
    assert limit_reached(broken) == limit


@pytest.fixture(scope="module")
def small() -> Iterator[EngineProcess]:
    """An engine process on a device that has less of everything."""
    simulated = SimulatorOptions.from_environment()
    if simulated is None:
        pytest.skip("what a real NPU has cannot be chosen")
    # torch_npu makes 34 streams; each graph holds one more.
    options = replace(simulated, memory=256 * MIB, streams=36).to_json()
    process = EngineProcess({OPTIONS_VARIABLE: options, "VLLM_LOGGING_LEVEL": "INFO"})
    yield process
    process.stop()


@pytest.mark.engine
@pytest.mark.parametrize(
    ("limit", "options"),
    [
        # The cache leaves a few MiB, too little for the pool of the graphs.
        ("device memory", {"kv_cache_memory_bytes": 228 * MIB}),
        # vLLM wants most of a device to be free; the first engine left a little.
        ("streams", {"gpu_memory_utilization": 0.5}),
    ],
    ids=["memory", "streams"],
)
def test_without_room_for_graphs_an_engine_serves_eagerly(
    npu: EngineProcess,
    small: EngineProcess,
    models: NPUModels,
    limit: str,
    options: dict[str, Any],
) -> None:
    model = models("qwen3", layers=2)
    run = {"prompts": [tokens(count, seed=count) for count in (7, 60)], "max_tokens": 4}
    answer = small.run(settings(model, "full", **options), run)
    assert f"The graphs need more {limit} than there is: serving eagerly" in answer.log
    assert "capture fewer sizes (-cc.cudagraph_capture_sizes=[1,2,4])" in answer.log
    assert answer.made_of["graphs"]["replays"] == 0
    assert_near(npu.run(settings(model), run).outputs(), answer.outputs())


def test_sleep_mode_is_refused_and_why(caplog: pytest.LogCaptureFixture) -> None:
    """Asked by vLLM when it checks the model's configuration; it refuses the engine then."""
    from ascend_plugin.platform.npu import AscendNPUPlatform

    with caplog.at_level("WARNING", "ascend_plugin"):
        assert not AscendNPUPlatform().is_sleep_mode_available()
    assert "--enable-sleep-mode is not served on an NPU: vLLM's allocator" in caplog.text


@pytest.mark.parametrize(
    ("connector", "dtype", "kv_cache", "refused"),
    [
        ("ExampleConnector", "int8_per_token_head", {}, True),
        ("ExampleConnector", "int8_per_token_head", {"variant": "c8d"}, True),
        ("ExampleConnector", "int8_per_token_head", {"variant": "c8p"}, True),
        ("ExampleConnector", "int8_per_token_head", {"variant": "c8s", "layers": C8D}, True),
        ("ExampleConnector", "int8_per_token_head", {"variant": "c8s"}, False),
        ("ExampleConnector", "auto", {}, False),
        (None, "int8_per_token_head", {"variant": "c8d"}, False),
    ],
)
def test_connectors_would_leave_scales_of_c8d_behind(
    connector: str | None, dtype: str, kv_cache: dict[str, Any], refused: bool
) -> None:
    from ascend_plugin.config import ConfigError, KVCacheConfig
    from ascend_plugin.platform.npu_config import _refuse_moving_scales

    engine: Any = SimpleNamespace(
        cache_config=SimpleNamespace(cache_dtype=dtype), kv_transfer_config=connector
    )
    with pytest.raises(ConfigError, match="moves a block as one piece") if refused else OK:
        _refuse_moving_scales(engine, KVCacheConfig(**kv_cache))
