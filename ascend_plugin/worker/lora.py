"""LoRA, on both platforms: products with the adapters of every slot, masked.

vLLM's kernels for LoRA are written in Triton. Its operators in plain torch read lengths back from
the device at every step, copy a matrix for every token, and give tokens without an adapter that of
the last slot. Here the shapes depend on the configuration alone, so nothing waits for the device
and captured graphs hold. A slot costs little beside the layer that it adapts: its rank over the
layer's width.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from vllm.lora.layers import LoRAMapping
from vllm.lora.punica_wrapper.punica_base import PunicaWrapperBase


class MaskedPunicaWrapper(PunicaWrapperBase):
    """What vLLM's LoRA layers call; one for all layers of a model.

    Shapes: ``x`` is ``[tokens, in]``, stacked A ``[slots, 1, rank, in]``, stacked B
    ``[slots, 1, out, rank]``, and ``y`` ``[tokens, out]`` is added to in place.
    """

    def __init__(
        self,
        max_num_batched_tokens: int,
        max_batches: int,
        device: torch.device | str,
        **kwargs: Any,
    ) -> None:
        """Make the masks; arguments as in ``PunicaWrapperBase``, with ``lora_config``."""
        super().__init__(max_num_batched_tokens, max_batches, device, **kwargs)
        lora = kwargs["lora_config"]
        shape = (max_num_batched_tokens, lora.max_loras)
        # Ones where a row uses a slot. Zeros at the start: rows that only fill up a graph's batch.
        self._of_tokens = torch.zeros(shape, dtype=lora.lora_dtype, device=device)
        self._of_samples = torch.zeros_like(self._of_tokens)
        self._slots = torch.arange(lora.max_loras, device=device)

    def update_metadata(
        self,
        mapping: LoRAMapping,
        lora_index_to_id: list[int | None],
        max_loras: int,
        vocab_size: int,
        **kwargs: Any,
    ) -> None:
        """Say which adapter each row of the step uses; arguments as in ``PunicaWrapperBase``."""
        self._update_base_metadata(mapping, lora_index_to_id, max_loras, vocab_size)
        for mask, slots in (
            (self._of_tokens, self.token_lora_indices),
            (self._of_samples, self.sampler_indices),
        ):
            mask[: slots.shape[0]].copy_(slots[:, None] == self._slots)

    def add_shrink(
        self,
        y: Sequence[Tensor] | Tensor,
        x: Tensor,
        lora_a_stacked: tuple[Tensor, ...],
        scale: float,
        **kwargs: Any,
    ) -> None:
        """Write ``x @ A * scale`` of each slice into ``y[slice]``, ``[tokens, rank]``."""
        x = x.view(-1, x.shape[-1])
        for out, weight in zip(y, lora_a_stacked, strict=True):
            out.copy_(_shrink(x, weight, self._of_tokens[: x.shape[0]]) * scale)

    def add_expand(
        self,
        y: Tensor,
        x: Sequence[Tensor] | Tensor,
        lora_b_stacked: tuple[Tensor, ...],
        output_slices: tuple[int, ...],
        offset_start: int = 0,
        add_inputs: bool = True,
        **kwargs: Any,
    ) -> None:
        """Add ``x[slice] @ B`` to the columns of each slice, which follow each other."""
        y = y.view(-1, y.shape[-1])
        start = offset_start
        for rows, weight, width in zip(x, lora_b_stacked, output_slices, strict=True):
            part = _expand(rows, weight, self._of_tokens[: y.shape[0]])
            _add(y[:, start : start + width], part, add_inputs)
            start += width

    def add_lora_linear(
        self,
        y: Tensor,
        x: Tensor,
        lora_a_stacked: tuple[Tensor, ...],
        lora_b_stacked: tuple[Tensor, ...],
        scale: float,
        output_slices: tuple[int, ...],
        *,
        buffer: tuple[Tensor, ...] | None = None,
        **kwargs: Any,
    ) -> None:
        """Add ``x @ A @ B * scale`` to a linear layer's output; ``buffer`` is not needed."""
        x = x.view(-1, x.shape[-1])
        mask = self._of_tokens[: x.shape[0]]
        shrunk = [_shrink(x, weight, mask) for weight in lora_a_stacked]
        if scale != 1.0:
            shrunk = [rows * scale for rows in shrunk]
        add_inputs = kwargs.get("add_inputs", True)
        self.add_expand(y, shrunk, lora_b_stacked, output_slices, add_inputs=add_inputs)

    def add_lora_embedding(
        self,
        y: Tensor,
        x: Tensor,
        lora_b_stacked: Tensor,
        add_inputs: bool = True,
        **kwargs: Any,
    ) -> None:
        """Add ``x @ B`` to embeddings; ``x`` holds the rows of A of each token's adapter."""
        _add(y, _expand(x, lora_b_stacked, self._of_tokens[: x.shape[0]]), add_inputs)

    def add_lora_logits(
        self,
        y: Tensor,
        x: Tensor,
        lora_a_stacked: Tensor,
        lora_b_stacked: Tensor,
        scale: float,
        *,
        buffer: Tensor | None = None,
        **kwargs: Any,
    ) -> None:
        """Add ``x @ A @ B * scale`` to logits; ``buffer`` is not needed."""
        x = x.view(-1, x.shape[-1])
        mask = self._of_samples[: x.shape[0]]
        rows = _shrink(x, lora_a_stacked, mask) * scale
        _add(y.view(-1, y.shape[-1]), _expand(rows, lora_b_stacked, mask), add=True)

    def apply_lora_full_linear(
        self,
        y: Tensor,
        x: Tensor,
        weight_stacked: Tensor,
        bias_stacked: Tensor,
        module_enabled: Tensor,
    ) -> None:
        """Replace rows by those of an adapter that brings a whole linear layer."""
        rows = _shrink(x, weight_stacked, self._of_samples[: x.shape[0]])
        y.copy_(self._select_full_linear_output(y, rows, bias_stacked, module_enabled))


def _shrink(x: Tensor, weight: Tensor, mask: Tensor) -> Tensor:
    """Return ``[tokens, rank]``: each row times the A of its slot; without one, anything."""
    slots, rank = weight.shape[0], weight.shape[-2]
    all_slots = torch.nn.functional.linear(x, weight.reshape(slots * rank, -1).to(x.dtype))
    if slots == 1:
        return all_slots
    each = all_slots.view(-1, slots, rank) * mask[:, :, None].to(x.dtype)
    return each.sum(1)


def _expand(x: Tensor, weight: Tensor, mask: Tensor) -> Tensor:
    """Return ``[tokens, out]``: each row times the B of its slot; without one, zeros."""
    slots, rank = weight.shape[0], weight.shape[-1]
    # Side by side, with zeros for the slots that a row does not use: one product for all.
    wide = x.to(weight.dtype)[:, None, :] * mask[:, :, None].to(weight.dtype)
    by_output = weight.view(slots, -1, rank).transpose(0, 1).reshape(-1, slots * rank)
    return torch.nn.functional.linear(wide.view(-1, slots * rank), by_output)


def _add(y: Tensor, part: Tensor, add: bool) -> None:
    """Add to the columns that both have; one of them may be padded."""
    width = min(y.shape[1], part.shape[1])
    if add:
        y[:, :width].add_(part[:, :width])
    else:
        y[:, :width].copy_(part[:, :width])
