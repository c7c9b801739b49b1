"""A draft model's projection over some tokens: which projections it can serve, and its values.

Whole engines are in ``tests/engine/test_draft_head.py``.
"""

from __future__ import annotations

import pytest
import torch
from torch import nn

from ascend_plugin.spec_decode.draft_head import DraftHead, HeadError

VOCABULARY, HIDDEN = 50, 32
KEPT = torch.tensor([0, 3, 17, 49])


class Draft(nn.Module):
    """A model of which only the projection matters."""

    def __init__(self, heads: int = 1, bias: bool = False, soft_cap: float | None = None) -> None:
        from vllm.config import VllmConfig, set_current_vllm_config
        from vllm.model_executor.layers.logits_processor import LogitsProcessor

        super().__init__()
        with set_current_vllm_config(VllmConfig()):
            self.processors = nn.ModuleList(
                LogitsProcessor(VOCABULARY, soft_cap=soft_cap, scale=0.5) for _ in range(heads)
            )
        self.head = Head()
        self.bias = torch.ones(VOCABULARY) if bias else None

    def compute_logits(self, hidden: torch.Tensor) -> torch.Tensor:
        return self.processors[0](self.head, hidden, self.bias)


class Head(nn.Module):
    """What vLLM's head is where there is one worker."""

    def __init__(self) -> None:
        from vllm.model_executor.layers.vocab_parallel_embedding import (
            UnquantizedEmbeddingMethod,
            VocabParallelEmbeddingShardIndices,
        )

        super().__init__()
        generator = torch.Generator().manual_seed(0)
        weight = torch.randn(64, HIDDEN, generator=generator)  # padded
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.tp_size = 1
        self.shard_indices = VocabParallelEmbeddingShardIndices(0, 64, 64, 64, 0, 50, 50, 50)
        self.quant_method = UnquantizedEmbeddingMethod()
        self.quant_method.process_weights_after_loading(self)


def hidden_states(rows: int) -> torch.Tensor:
    return torch.randn(rows, HIDDEN, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("soft_cap", [None, 2.0])
@pytest.mark.parametrize("rows", [0, 1, 7])
def test_logits_of_kept_tokens_are_the_models(rows: int, soft_cap: float | None) -> None:
    model, hidden = Draft(soft_cap=soft_cap), hidden_states(rows)
    whole = model.compute_logits(hidden)
    head = DraftHead(model, KEPT)
    head.prepare(HIDDEN, torch.float32)
    found = model.compute_logits(hidden)
    assert found.shape == whole.shape
    torch.testing.assert_close(found[:, KEPT], whole[:, KEPT])
    others = torch.ones(VOCABULARY, dtype=torch.bool)
    others[KEPT] = False
    assert found[:, others].isneginf().all()
    assert head.top_tokens(hidden).tolist() == found.argmax(-1).tolist()


def test_the_target_keeps_its_own() -> None:
    draft, target, hidden = Draft(), Draft(), hidden_states(3)
    whole = target.compute_logits(hidden)
    target.head = draft.head  # shared, as vLLM shares them
    DraftHead(draft, KEPT).prepare(HIDDEN, torch.float32)
    torch.testing.assert_close(target.compute_logits(hidden), whole)


def test_projections_that_it_cannot_serve() -> None:
    for model, message in (
        (Draft(heads=2), "Draft has 2 layers that make logits"),
        (Draft(heads=0), "Draft has 0 layers that make logits"),
        (Draft(bias=True), "its logits have a bias"),
    ):
        with pytest.raises(HeadError, match=message):
            DraftHead(model, KEPT).prepare(HIDDEN, torch.float32)
    model = Draft()
    with pytest.raises(HeadError, match="its head has 50 tokens"):
        DraftHead(model, torch.tensor([3, 50])).prepare(HIDDEN, torch.float32)
    model.head.quant_method = object()
    with pytest.raises(HeadError, match=r"its head is quantised \(object\)"):
        DraftHead(model, KEPT).prepare(HIDDEN, torch.float32)


def test_a_refusal_leaves_the_model_as_it_was() -> None:
    model, hidden = Draft(bias=True), hidden_states(2)
    whole = model.compute_logits(hidden)
    with pytest.raises(HeadError):
        DraftHead(model, KEPT).prepare(HIDDEN, torch.float32)
    torch.testing.assert_close(model.compute_logits(hidden), whole)
