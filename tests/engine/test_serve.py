"""``vllm serve`` from the outside: a question over HTTP, and a clean stop."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from int8_engines import Int8Models
from serving import ask, expect_an_answer, expect_end_with_engine, serving, stop

from ascend_plugin.model.tiny import write_tiny_llama
from ascend_plugin.worker.cpu_process import cores_are_few

REPOSITORY = Path(__file__).resolve().parents[2]
CONFIGS = sorted((REPOSITORY / "configs" / "serve").glob("*.yaml"))


@pytest.mark.engine
@pytest.mark.model
@pytest.mark.slow
def test_serve(smollm2: str, tmp_path: Path) -> None:
    config = str(REPOSITORY / "configs" / "serve" / "smollm2-cpu.yaml")
    with serving(tmp_path, smollm2, "--config", config, "--block-size", "32") as server:
        expect_an_answer(server, "What is the capital of France?", "Paris")
        log = server[2].read_text()
        assert "paged_attention runs on 'native'" in log
        assert ("The model runs in the scheduler's process" in log) == cores_are_few()
        stop(server)


@pytest.mark.engine
@pytest.mark.slow
def test_counters_of_an_int8_cache_on_metrics(int8: Int8Models, tmp_path: Path) -> None:
    """From the worker's process to the server's, which ends when the worker does."""
    model = int8("llama")
    options = {
        "--served-model-name": "tiny",
        "--dtype": "float32",
        "--max-model-len": "512",
        "--kv-cache-memory-bytes": str(1 << 26),
        "--kv-cache-dtype": "int8_per_token_head",
        "--additional-config": json.dumps(model.config("c8p")),
    }
    flags = ["--skip-tokenizer-init", "--enforce-eager"]
    with serving(tmp_path, model.path, *flags, *sum(options.items(), ())) as server:
        port = server[1]
        assert "ascend_plugin:kv_cache_rows_total{" not in ask(port, "/metrics")
        prompt = [5, 7, 14, 21, 9, 28, 35, 42]
        body = {"model": "tiny", "prompt": prompt, "max_tokens": 4, "detokenize": False}
        assert json.loads(ask(port, "/v1/completions", body))["usage"]["completion_tokens"] == 4
        labels = '{model_name="tiny",variant="c8p"}'
        lines = ask(port, "/metrics").splitlines()
        counts = {line.split("{")[0]: float(line.split()[-1]) for line in lines if labels in line}
        expect_end_with_engine(server)
    rows = (len(prompt) + 3) * 2 * 2 * model.offline.layers
    assert counts["ascend_plugin:kv_cache_rows_total"] == rows
    assert 0 < counts["ascend_plugin:kv_cache_patched_total"] < rows
    assert counts["ascend_plugin:kv_cache_saturated_total"] > 0
    assert counts["ascend_plugin:kv_cache_patch_overflows_total"] == 0


@pytest.mark.engine
@pytest.mark.slow
def test_a_bad_file_of_scales_is_told_before_anything_starts(tmp_path: Path) -> None:
    """In one sentence at the end of the log, with the file, what is wrong, and the remedy."""
    model = write_tiny_llama(tmp_path / "model", head_dim=64, dtype="float32")
    bad = tmp_path / "bad.safetensors"
    bad.write_bytes(b"these are no scales")
    config = {"kv_cache": {"variant": "c8s", "scales": str(bad)}}
    options = ["--dtype", "float32", "--kv-cache-dtype", "int8_per_token_head"]
    options += ["--additional-config", json.dumps(config), "--skip-tokenizer-init"]
    command = [str(Path(sys.executable).with_name("vllm")), "serve", str(model), *options]
    done = subprocess.run(
        command, cwd=tmp_path, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 1
    told = [line for line in done.stderr.splitlines() if "is not a safetensors file" in line]
    assert len(told) == 1
    assert f"{bad} is not a safetensors file" in told[0]
    assert "Make the file again with 'ascend-plugin calibrate kv'" in told[0]
    assert "EngineCore" not in done.stdout + done.stderr


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_configurations_are_understood(path: Path) -> None:
    """By the parser of ``vllm serve``, which refuses options that do not exist."""
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.entrypoints.cli.serve import ServeSubcommand
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    parser = FlexibleArgumentParser()
    ServeSubcommand().subparser_init(parser.add_subparsers())
    plain = vars(parser.parse_args(["serve", "some/model"]))
    parsed = parser.parse_args(["serve", "some/model", "--config", str(path)])
    changed = {key for key, value in vars(parsed).items() if value != plain[key]}
    written = yaml.safe_load(path.read_text())
    assert changed - {"config"} <= {key.replace("-", "_") for key in written}
    assert len(changed) > 1
    AsyncEngineArgs.from_cli_args(parsed)


def test_there_are_configurations() -> None:
    assert CONFIGS
