"""Patches of vLLM: applied once, and they do what they say. Engine tests run them for real."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from vllm.renderers.base import BaseRenderer

from ascend_plugin.compat import apply_patches


@pytest.fixture
def _stock() -> Iterator[None]:
    """Vllm's own method before and after a test, whatever this process did earlier."""
    current = BaseRenderer.validate_token_ids
    BaseRenderer.validate_token_ids = getattr(current, "__wrapped__", current)
    yield
    BaseRenderer.validate_token_ids = current


@pytest.mark.usefixtures("_stock")
def test_patches_are_applied_once() -> None:
    stock = BaseRenderer.validate_token_ids
    apply_patches()
    patched = BaseRenderer.validate_token_ids
    assert patched is not stock
    apply_patches()
    assert BaseRenderer.validate_token_ids is patched
    assert patched.__wrapped__ is stock
    assert patched.__name__ == stock.__name__
