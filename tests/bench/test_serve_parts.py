"""Parts of ``bench serve`` that need no engine."""

from __future__ import annotations

import json
from dataclasses import dataclass

import pytest

from ascend_plugin.bench.errors import BenchError
from ascend_plugin.bench.serve import driver
from ascend_plugin.bench.serve.models import QWEN3, resolve_model
from ascend_plugin.bench.serve.rows import equal_prefix
from ascend_plugin.bench.serve.runner import random_prompts
from ascend_plugin.bench.serve.settings import Settings


@dataclass
class _Unknown:
    """Not one of the messages."""

    value: int = 0


def _settings(**changes) -> Settings:
    values = {
        "batches": (1, 8),
        "contexts": (1536,),
        "new_tokens": 32,
        "rounds": 3,
        "threads": 1,
        "variant": "bf16",
    }
    return Settings(**(values | changes))


def test_contenders_differ_in_the_plugins_alone():
    environment = {"VLLM_TARGET_DEVICE": "cpu", "VLLM_CPU_KVCACHE_SPACE": "1", "KEPT": "yes"}
    ours = driver.worker_environment(driver.OURS, 2, environment)
    stock = driver.worker_environment(driver.STOCK, 2, environment)
    assert {name for name in ours if ours[name] != stock[name]} == {"VLLM_PLUGINS"}
    assert ours["OMP_NUM_THREADS"] == "2"
    assert ours["VLLM_CPU_OMP_THREADS_BIND"] == "nobind"
    assert ours["KEPT"] == "yes"
    assert "VLLM_TARGET_DEVICE" not in ours
    assert "VLLM_CPU_KVCACHE_SPACE" not in ours


def test_llama_cpp_gets_the_callers_environment():
    environment = {"LD_PRELOAD": "/opt/mine.so", "OMP_NUM_THREADS": "7"}
    peer = driver.worker_environment(driver.LLAMA_CPP, 2, environment)
    assert peer == {"LD_PRELOAD": "/opt/mine.so", "OMP_NUM_THREADS": "2"}


def test_an_openmp_that_is_preloaded_stays_the_only_one():
    assert "libgomp" in driver.preload("")
    assert "libgomp" not in driver.preload("/opt/libiomp5.so")
    assert driver.preload("/opt/libiomp5.so").endswith("/opt/libiomp5.so")


def test_prompts_are_the_same_for_both_and_inside_the_vocabulary():
    prompts = random_prompts(50, 3, 20)
    assert prompts == random_prompts(50, 3, 20)
    assert all(0 <= token < 50 for prompt in prompts for token in prompt)
    assert len({tuple(prompt) for prompt in prompts}) == 3


def test_equal_prefix():
    assert equal_prefix([[1, 2, 3], [4, 5]], [[1, 9, 3], [4, 5, 6]]) == (3, 5)
    assert equal_prefix([[]], [[1]]) == (0, 0)


def test_requests_outlive_all_rounds():
    settings = _settings()
    # The first of 8 requests decodes in every step of the others' prefill.
    assert settings.max_tokens(8, 1536) > 3 * 32 + 8 * 1536 // 4096


def test_the_dummy_model_is_what_it_says(tmp_path):
    model = resolve_model(QWEN3, tmp_path)
    config = json.loads((model.path / "config.json").read_text())
    assert (config["num_hidden_layers"], config["hidden_size"]) == (28, 1024)
    assert model.load_format == "dummy"
    assert model.token_bytes("bf16") == 28 * 2 * 8 * 128 * 2


def test_a_configuration_without_attention_is_refused(tmp_path):
    (tmp_path / "config.json").write_text('{"vocab_size": 10}')
    with pytest.raises(BenchError, match="num_hidden_layers"):
        resolve_model(str(tmp_path), tmp_path)


def test_a_worker_that_dies_is_reported(tmp_path):
    worker = driver.WorkerProcess(driver.STOCK, 1, tmp_path / "log")
    try:
        with pytest.raises(BenchError, match=r"the engine of vllm ended with exit code 1"):
            # Not a command: the worker fails on it, as on anything unexpected.
            worker.ask(_Unknown(), driver.messages.Finished)
    finally:
        worker.close()


@pytest.mark.parametrize("value", [0, -3])
def test_settings_without_extent_are_refused(value):
    with pytest.raises(BenchError, match=r"--new-tokens"):
        _settings(new_tokens=value)
