"""Shared set-up of every test: helpers on the path, hypothesis' profile, the op implementations."""

from __future__ import annotations

import importlib.util
import os
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import hypothesis
import pytest

# Appended, and only this folder: tests/ops must not become importable as "ops".
sys.path.append(str(Path(__file__).parent / "support"))

# A debug switch in the developer's shell must not decide what the tests test. What `ascend-plugin
# sim run` sets stays: it is the machine that the tests run on.
_SIMULATOR = ("ASCEND_PLUGIN_SIM", "ASCEND_PLUGIN_SIM_CACHE")
for _variable in [name for name in os.environ if name.startswith("ASCEND_PLUGIN_")]:
    if _variable in _SIMULATOR:
        continue
    del os.environ[_variable]

# Beside another worker of pytest-xdist, threads that wait must not spin, and two engines must not
# bind their threads to the same core; tests of threads and of binding say what they want.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ |= {
        "OMP_NUM_THREADS": "1",
        "OMP_WAIT_POLICY": "passive",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    }

hypothesis.settings.register_profile(
    "ascend_plugin",
    deadline=None,  # two shared cores: time says nothing
    derandomize=True,
    print_blob=True,
    suppress_health_check=[
        hypothesis.HealthCheck.too_slow,
        # Fixtures here choose an implementation and hold no state between examples.
        hypothesis.HealthCheck.function_scoped_fixture,
    ],
)
hypothesis.settings.load_profile("ascend_plugin")

# These run where torch_npu is: on hardware, and under `ascend-plugin sim run` (make test).
if importlib.util.find_spec("torch_npu") is None:
    collect_ignore = ["npu", "sim"]


#: What commands and the set-up of engines leave in the environment for processes that they start.
_LEFT_BEHIND = ("VLLM_LOGGING_LEVEL", "ASCEND_PLUGIN_METRICS")


@pytest.fixture(autouse=True)
def _environment_stays() -> Iterator[None]:
    """Put back variables that the tested code sets: later engines of the tests inherit them."""
    before = {name: os.environ.get(name) for name in _LEFT_BEHIND}
    yield
    for name, value in before.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value


REPOSITORY = Path(__file__).resolve().parents[1]


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """For workers: files with engines first, then those with many tests.

    They take minutes each; what comes last is short, and the workers end together.
    """
    if not hasattr(config, "workerinput"):
        return
    from distribution import unit_of

    units = {item: unit_of(item.nodeid) for item in items}
    tests = Counter(units.values())
    engines = Counter(unit for item, unit in units.items() if item.get_closest_marker("engine"))
    items.sort(key=lambda item: (-engines[units[item]], -tests[units[item]]))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Return what hands whole files to workers: tests of a file share engines and models."""
    from distribution import FileScheduling

    return FileScheduling(config, log)


@pytest.fixture(scope="session")
def repository() -> Path:
    """The checkout that is tested."""
    return REPOSITORY


@pytest.fixture(scope="session")
def real_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The float model that the checkpoints of real tools were made from."""
    from real_checkpoints import write_base

    folder = tmp_path_factory.mktemp("base") / "float"
    write_base(folder)
    return folder


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Run every test that asks for ``implementation`` once per implementation."""
    if "implementation" in metafunc.fixturenames:
        from implementations import IMPLEMENTATIONS

        metafunc.parametrize("implementation", IMPLEMENTATIONS, indirect=True)


@pytest.fixture
def implementation(request: pytest.FixtureRequest) -> Iterator[str]:
    """Make the operators run on one implementation during a test; its name."""
    from implementations import forced, why_not

    reason = why_not(request.param)
    if reason:
        pytest.skip(reason)
    with forced(request.param):
        yield request.param
