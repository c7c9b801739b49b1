"""Limits of the device that a capture may reach, told from mistakes."""

from __future__ import annotations

from collections.abc import Callable

import pytest


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
