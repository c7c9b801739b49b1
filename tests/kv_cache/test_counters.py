"""Counters that travel between processes in files, up to the text of ``/metrics``."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from processes import run_python

from ascend_plugin.kv_cache.counters import KVCounters, read_counters
from ascend_plugin.metrics_folder import FOLDER_VARIABLE
from ascend_plugin.ops.page_layout import Quantisation

COUNT = """
import sys
from ascend_plugin.kv_cache.counters import KVCounters
from ascend_plugin.ops.page_layout import Quantisation
counters = KVCounters(sys.argv[1])
for variant, *counts in eval(sys.argv[2]):
    counts_of = counters.of(Quantisation[variant])
    for i, count in enumerate(counts):
        counts_of[i] += count
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv(FOLDER_VARIABLE, str(tmp_path))
    return tmp_path


def test_counts_of_several_processes(folder: Path) -> None:
    jobs = [
        ("a/b", [("C8P", 9, 3, 2, 1)]),
        ("a/b", [("C8P", 1, 1, 1, 1), ("C8D", 5, 0, 0, 0)]),
        ("ünder", [("C8S", 2**40, 7, 0, 0)]),
        ("idle", []),
    ]
    for model, counts in jobs:
        done = run_python(COUNT, model, repr(counts))
        assert done.returncode == 0, done.stderr
    assert read_counters() == {
        ("a/b", "c8p"): (10, 4, 3, 2),
        ("a/b", "c8d"): (5, 0, 0, 0),
        ("ünder", "c8s"): (2**40, 7, 0, 0),
    }


def test_counting_shows_at_once(folder: Path) -> None:
    counters = KVCounters("model")
    own = counters.of(Quantisation.C8D)
    assert own.dtype == torch.int64
    assert own.shape == (4,)
    assert own.is_contiguous()
    for _ in range(2):
        own += torch.tensor([2, 1, 0, 0])
    assert read_counters() == {("model", "c8d"): (4, 2, 0, 0)}
    (folder / "kv-1-1.partial").write_bytes(b"not complete")
    assert len(read_counters()) == 1


def test_without_a_folder_nothing_is_shared(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(FOLDER_VARIABLE, raising=False)
    KVCounters("model").of(Quantisation.C8S)[0] += 1
    assert read_counters() == {}
    monkeypatch.setenv(FOLDER_VARIABLE, "/nowhere")
    KVCounters("model").of(Quantisation.C8S)[0] += 1
    assert read_counters() == {}


SEVERAL_SERVERS = """
import ascend_plugin
for _ in range(2):
    ascend_plugin.register_general()
from prometheus_client import CollectorRegistry, Counter, generate_latest
from prometheus_client.multiprocess import MultiProcessCollector
Counter("theirs", "of the server").inc()
registry = CollectorRegistry()
MultiProcessCollector(registry)
print(generate_latest(registry).decode())
"""


def test_metrics_of_several_api_servers(folder: Path, tmp_path_factory) -> None:
    KVCounters("model").of(Quantisation.C8P)[:] = torch.tensor([8, 4, 2, 1])
    files = tmp_path_factory.mktemp("prometheus")
    done = run_python(SEVERAL_SERVERS, env={"PROMETHEUS_MULTIPROC_DIR": str(files)})
    assert done.returncode == 0, done.stderr
    assert "theirs_total 1.0" in done.stdout
    labels = '{model_name="model",variant="c8p"}'
    for name, count in (("rows", 8), ("saturated", 4), ("patched", 2), ("patch_overflows", 1)):
        assert done.stdout.count(f"ascend_plugin:kv_cache_{name}_total{labels} {count}.0\n") == 1
