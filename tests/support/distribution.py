"""How tests are handed to the workers of pytest-xdist: by file, in the order of the collection."""

from __future__ import annotations

from typing import Any

import pytest
from xdist.scheduler import LoadFileScheduling

#: Beginnings of files that must run in one process: the last of them counts what all ran.
TOGETHER = ("tests/sim/test_operators_",)


class FileScheduling(LoadFileScheduling):
    """A file, or the files of one family, at a time."""

    def __init__(self, config: pytest.Config, log: Any) -> None:
        # Else files with many tests come first, which are the quick ones.
        config.option.loadscopereorder = False
        super().__init__(config, log)

    def _split_scope(self, nodeid: str) -> str:
        for family in TOGETHER:
            if nodeid.startswith(family):
                return family
        return super()._split_scope(nodeid)
