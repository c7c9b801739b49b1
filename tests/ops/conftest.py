"""One thread for the arithmetic of tests; tests of threads ask for more."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from implementations import threads


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> Iterator[None]:
    with threads(1):
        yield
