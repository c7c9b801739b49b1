"""Shared set-up of every test: helpers on the path, hypothesis' profile, the op implementations."""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Iterator
from pathlib import Path

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

REPOSITORY = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="session")
def repository() -> Path:
    """The checkout that is tested."""
    return REPOSITORY


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
