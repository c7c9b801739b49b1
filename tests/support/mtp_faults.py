"""Faults of drafting that never change a token, only how many drafts are accepted."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def planted(name: str | None) -> Iterator[None]:
    """Plant a fault into what drafts; None plants nothing."""
    if name is None:
        yield
        return
    from vllm.v1.spec_decode.llm_base_proposer import SpecDecodeBaseProposer

    from ascend_plugin.spec_decode.draft_keys import DeferredKeys

    method, broken = FAULTS[name]
    owner: Any = DeferredKeys if method == "_catch_up" else SpecDecodeBaseProposer
    original = getattr(owner, method)
    setattr(owner, method, broken(original))
    try:
        yield
    finally:
        setattr(owner, method, original)


def _stale_keys(original: Any) -> Any:
    """Keep the keys that drafts wrote, instead of those of the tokens that were verified."""

    def get(self: Any, num_tokens: int, slot_mapping: Any = None) -> Any:
        if slot_mapping is not None and len(slot_mapping) < 80:  # no chunk of a prompt in it
            slot_mapping = slot_mapping.clone().fill_(-1)
        return original(self, num_tokens, slot_mapping)

    return get


def _late_embedding(original: Any) -> Any:
    """Draft from each position's own token instead of the next one."""

    def set_inputs(self: Any, *args: Any, **named: Any) -> Any:
        found = original(self, *args, **named)
        tokens = named["target_token_ids"]
        last = found[1]
        next_tokens = self.input_ids[last].clone()
        self.input_ids[: len(tokens)] = tokens
        self.input_ids[last] = next_tokens
        return found

    return set_inputs


def _same_position(original: Any) -> Any:
    """Leave the position where it was for every later draft of a chain."""

    def update(self: Any, positions: Any, *args: Any, **named: Any) -> Any:
        kept = positions.clone()
        found = original(self, positions, *args, **named)
        found.copy_(kept)
        return found

    return update


def _last_of_prompt(patched: Any) -> Any:
    """Take vLLM's own function instead of ours."""
    return patched.__wrapped__


def _lost_keys(original: Any) -> Any:
    """Forget what steps without drafts kept for the layer."""

    def catch_up(self: Any, call: Any, ends: Any) -> None:
        self._kept.clear()

    return catch_up


FAULTS = {
    "lost keys": ("_catch_up", _lost_keys),
    "stale keys": ("_get_slot_mapping", _stale_keys),
    "late embedding": ("set_inputs_first_pass", _late_embedding),
    "same position": ("_update_positions_dependent_metadata", _same_position),
    "last token of the prompt": ("prepare_next_token_ids_padded", _last_of_prompt),
}
