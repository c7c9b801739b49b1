"""How tests are handed to the workers of pytest-xdist: by file, in the order of the collection."""

from __future__ import annotations

from typing import Any

import pytest
from xdist.scheduler import LoadFileScheduling

#: Beginnings of files that must run in one process: the last of them counts what all ran.
TOGETHER = ("tests/sim/test_operators_",)


def unit_of(nodeid: str) -> str:
    """Return what a test is handed out with: its file, or the family of its file."""
    for family in TOGETHER:
        if nodeid.startswith(family):
            return family
    return nodeid.partition("::")[0]


class FileScheduling(LoadFileScheduling):
    """A file, or the files of one family, at a time."""

    def __init__(self, config: pytest.Config, log: Any) -> None:
        # The order is that of tests/conftest.py, which knows more than the number of tests.
        config.option.loadscopereorder = False
        super().__init__(config, log)

    def _split_scope(self, nodeid: str) -> str:
        return unit_of(nodeid)
