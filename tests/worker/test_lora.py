"""The operators of LoRA layers, row by row against plain products."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import Tensor
from vllm.lora.layers import LoRAMapping

from ascend_plugin.worker.lora import MaskedPunicaWrapper

ROWS, WIDTH, RANK, ROOM = 7, 12, 4, 10

#: Ids of the adapters in the slots, and the id that each row asks for; 0: none.
IDS: dict[int, list[int | None]] = {1: [9], 3: [5, None, 9]}
ASKED = [9, 0, 5, 9, 0, 0, 9]


def _wrapper(slots: int) -> tuple[MaskedPunicaWrapper, list[int]]:
    """A wrapper that was told of a batch, and the slot of each row."""
    config = SimpleNamespace(max_loras=slots, lora_dtype=torch.float32)
    wrapper = MaskedPunicaWrapper(ROOM, ROOM, "cpu", lora_config=config)
    ids = IDS[slots]
    asked = tuple(each if each in ids else 0 for each in ASKED)
    full = LoRAMapping((9,) * ROOM, (9,) * ROOM, is_prefill=True)
    wrapper.update_metadata(full, ids, slots + 1, 256)  # an earlier, larger batch leaves nothing
    wrapper.update_metadata(LoRAMapping(asked, asked, is_prefill=True), ids, slots + 1, 256)
    return wrapper, [ids.index(each) if each else -1 for each in asked]


def _weights(slots: int, widths: tuple[int, ...]) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    a = tuple(torch.randn(slots, 1, RANK, WIDTH) for _ in widths)
    return a, tuple(torch.randn(slots, 1, width, RANK) for width in widths)


def _row_by_row(x: Tensor, a: Tensor | None, b: Tensor, slots: list[int]) -> Tensor:
    """What each row's own adapter adds; zeros without one."""
    out = torch.zeros(len(slots), b.shape[-2])
    for i, slot in enumerate(slots):
        if slot >= 0:
            inner = x[i] if a is None else a[slot, 0] @ x[i]
            out[i] = b[slot, 0] @ inner
    return out


@pytest.fixture(params=IDS, ids=lambda slots: f"{slots} slots")
def batch(request: pytest.FixtureRequest) -> tuple[int, MaskedPunicaWrapper, list[int]]:
    torch.manual_seed(0)
    return request.param, *_wrapper(request.param)


@pytest.mark.parametrize("scale", [1.0, 0.5])
def test_linear_layers_of_several_slices(
    batch: tuple[int, MaskedPunicaWrapper, list[int]], scale: float
) -> None:
    count, wrapper, slots = batch
    widths = (6, 3, 5)
    x, y = torch.randn(ROWS, WIDTH), torch.randn(ROWS, sum(widths))
    a, b = _weights(count, widths)
    parts = [_row_by_row(x, *each, slots) * scale for each in zip(a, b, strict=True)]
    want = y + torch.cat(parts, 1)
    wrapper.add_lora_linear(y, x, a, b, scale, widths)
    torch.testing.assert_close(y, want)


def test_shrinking_and_expanding_apart(batch: tuple[int, MaskedPunicaWrapper, list[int]]) -> None:
    """With fully sharded adapters a collective lies between the two."""
    count, wrapper, slots = batch
    widths, offset = (6, 3), 2
    x, y = torch.randn(ROWS, WIDTH), torch.randn(ROWS, 15)
    a, b = _weights(count, widths)
    want = y.clone()
    parts = [_row_by_row(x, *each, slots) for each in zip(a, b, strict=True)]
    want[:, offset : offset + sum(widths)] += torch.cat(parts, 1)
    buffer = torch.zeros(len(widths), ROWS, RANK)
    wrapper.add_shrink(buffer, x, a, 1.0)
    wrapper.add_expand(y, buffer, b, widths, offset_start=offset)
    torch.testing.assert_close(y, want)


def test_embeddings(batch: tuple[int, MaskedPunicaWrapper, list[int]]) -> None:
    count, wrapper, slots = batch
    x, y = torch.randn(ROWS, RANK), torch.randn(ROWS, 6)
    (b,) = _weights(count, (6,))[1]
    want = y + _row_by_row(x, None, b, slots)
    wrapper.add_lora_embedding(y, x, b)
    torch.testing.assert_close(y, want)


def test_logits_are_padded(batch: tuple[int, MaskedPunicaWrapper, list[int]]) -> None:
    count, wrapper, slots = batch
    x, y = torch.randn(ROWS, WIDTH), torch.randn(ROWS, 8)
    (a,), (b,) = _weights(count, (6,))
    want = y.clone()
    want[:, :6] += _row_by_row(x, a, b, slots)
    wrapper.add_lora_logits(y, x, a, b, 1.0)
    torch.testing.assert_close(y, want)


def test_whole_linear_layers(batch: tuple[int, MaskedPunicaWrapper, list[int]]) -> None:
    count, wrapper, slots = batch
    x, y = torch.randn(ROWS, WIDTH), torch.randn(ROWS, RANK)
    (weight,), _ = _weights(count, (6,))
    bias = torch.randn(count, RANK)
    enabled = torch.ones(count, dtype=torch.bool)
    want = y.clone()
    for i, slot in enumerate(slots):
        if slot >= 0:
            want[i] = weight[slot, 0] @ x[i] + bias[slot]
    wrapper.apply_lora_full_linear(y, x, weight, bias, enabled)
    torch.testing.assert_close(y, want)
