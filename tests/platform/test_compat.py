"""Patches of vLLM: applied once, and they do what they say. Engine tests run them for real."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.model_executor.layers.rotary_embedding import RotaryEmbedding, get_rope
from vllm.renderers.base import BaseRenderer

from ascend_plugin.compat import apply_patches, apply_worker_patches


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


@pytest.fixture
def _stock_rotary() -> Iterator[None]:
    """Vllm's own rotation before and after a test."""
    current = RotaryEmbedding.forward_cpu
    RotaryEmbedding.forward_cpu = getattr(current, "__wrapped__", current)
    yield
    RotaryEmbedding.forward_cpu = current


def _rotate_views(rotary: RotaryEmbedding, tokens: int) -> tuple[float, bool]:
    """Rotate views as latent attention has them: the greatest error, and what lies beside them."""
    rng = torch.Generator().manual_seed(tokens)
    query = torch.randn(tokens, 4, 96, generator=rng)
    latents = torch.randn(tokens, 576, generator=rng)
    before = query.clone(), latents.clone()
    positions = torch.arange(tokens) + 5
    want = rotary.forward_native(positions, query[..., 32:], latents[:, None, 512:])
    got = rotary.forward_cpu(positions, query[..., 32:], latents[:, None, 512:])
    error = max(float((a - b).abs().max()) for a, b in zip(want, got, strict=True))
    around = torch.equal(query[..., :32], before[0][..., :32])
    return error, around and torch.equal(latents[:, :512], before[1][:, :512])


@pytest.mark.usefixtures("_stock_rotary")
def test_views_are_rotated_in_place_of_their_neighbours() -> None:
    with set_current_vllm_config(VllmConfig()):
        rotary = get_rope(
            64,
            max_position=256,
            rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
            is_neox_style=False,
            dtype=torch.float32,
        )
    # What the patch is for; when this fails, vLLM needs it no more.
    assert any(error > 0.1 or not clean for error, clean in map(_both(rotary), (7, 130)))
    apply_worker_patches()
    for error, clean in map(_both(rotary), (1, 7, 130)):
        assert error < 1e-5
        assert clean
    # Rows of all heads, as other models have them, still go to vLLM's operator.
    rows = torch.randn(5, 3 * 64 + 10)
    want = rotary.forward_native(torch.arange(5), rows[:, :192].clone(), rows[:, :64].clone())
    got = rotary.forward_cpu(torch.arange(5), rows[:, :192].clone(), rows[:, :64].clone())
    for pair in zip(want, got, strict=True):
        torch.testing.assert_close(*pair)


def _both(rotary: RotaryEmbedding) -> Callable[[int], tuple[float, bool]]:
    return lambda tokens: _rotate_views(rotary, tokens)
